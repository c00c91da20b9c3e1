/* SPDX-License-Identifier: Apache-2.0
 *
 * A PKCS#11 module in front of another one (LOUD_MODULE) that prints to standard output, at once and
 * at the end of the process, as some vendors' do.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

unsigned long C_GetFunctionList(void **list) {
    if (write(1, "SDK Version: 2.03\n", 18) != 18) abort();
    printf("held back until the end\n");
    void *module = dlopen(getenv("LOUD_MODULE"), RTLD_NOW | RTLD_LOCAL);
    return ((unsigned long (*)(void **))dlsym(module, "C_GetFunctionList"))(list);
}
