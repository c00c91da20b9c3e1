/* SPDX-License-Identifier: Apache-2.0
 * The bare C loop that sign() is measured against: C_SignInit and C_Sign under a kept session.
 *     bare_loop MODULE TOKEN-LABEL KEY-LABEL, the PIN in BARE_PIN; for each number of signatures on
 *     standard input it prints the microseconds that one took. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef unsigned long ul;
typedef ul (*function)();
struct list { unsigned char version[2]; function f[68]; };
struct attribute { ul type; void *value; ul length; };
struct mechanism { ul mechanism; void *parameter; ul length; };
enum { INITIALIZE = 0, SLOTS = 4, TOKEN_INFO = 6, OPEN = 12, LOGIN = 18, FIND_INIT = 26, FIND = 27,
       FIND_FINAL = 28, SIGN_INIT = 42, SIGN = 43 };

#define OK(call) do { ul rv = (call); if (rv) { fprintf(stderr, #call ": %#lx\n", rv); exit(1); } } while (0)

int main(int argc, char **argv) {
    struct list *p;
    void *library = argc == 4 ? dlopen(argv[1], RTLD_NOW) : 0;
    if (!library) return 2;
    OK(((function)dlsym(library, "C_GetFunctionList"))(&p));
    OK(p->f[INITIALIZE]((void *)0));
    ul slots[64], count = 64, session = 0, key = 0, found = 0, kind = 3;
    OK(p->f[SLOTS]((unsigned char)1, slots, &count));
    for (ul i = 0; i < count && !session; i++) {
        char info[512], label[33];
        snprintf(label, sizeof label, "%-32s", argv[2]);
        if (!p->f[TOKEN_INFO](slots[i], info) && !memcmp(info, label, 32))
            OK(p->f[OPEN](slots[i], 4UL, (void *)0, (void *)0, &session));
    }
    char *pin = getenv("BARE_PIN");
    OK(p->f[LOGIN](session, 1UL, pin, (ul)strlen(pin)));
    struct attribute wanted[] = {{0, &kind, sizeof kind}, {3, argv[3], strlen(argv[3])}};
    OK(p->f[FIND_INIT](session, wanted, 2UL));
    OK(p->f[FIND](session, &key, 1UL, &found));
    OK(p->f[FIND_FINAL](session));
    struct mechanism ecdsa = {0x1041, 0, 0};
    unsigned char digest[32] = {1}, signature[128];
    for (long turns; scanf("%ld", &turns) == 1;) {
        struct timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        for (long i = 0; i < turns; i++) {
            ul length = sizeof signature;
            OK(p->f[SIGN_INIT](session, &ecdsa, key));
            OK(p->f[SIGN](session, digest, 32UL, signature, &length));
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        printf("%.3f\n", ((end.tv_sec - begin.tv_sec) * 1e9 + end.tv_nsec - begin.tv_nsec) / 1e3 / turns);
        fflush(stdout);
    }
    return 0;
}
