/* SPDX-License-Identifier: Apache-2.0
 *
 * A PKCS#11 module in front of another one (SHIM_MODULE), for tests: it counts calls and sessions,
 * notices a C_Finalize beside another call, and fails, hangs or aborts on request. What to do and
 * what was seen stands in a file that the test and this module map (SHIM_STATE); see shim.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define FUNCTIONS 68
typedef unsigned long ul;
typedef ul (*function)(ul, ul, ul, ul, ul, ul, ul, ul);

struct state {
    ul fault[FUNCTIONS];  /* CK_RV to answer, or one of the actions below; 0: none */
    ul times[FUNCTIONS];  /* for so many calls */
    ul calls[FUNCTIONS];
    ul sessions;          /* open now */
    ul most_sessions;
    ul inside;            /* calls now */
    ul finalized_beside;  /* C_Finalize while another call was under way */
    ul token_flags;       /* added to what C_GetTokenInfo answers */
    ul user_type;         /* of the last C_Login */
    ul inits_os_locking;  /* C_Initialize with CKF_OS_LOCKING_OK */
    ul heals;             /* C_Finalize ends all faults */
    ul limit;             /* of open sessions; 0: none */
    ul only_slot;         /* faults of calls about a slot are about this one; 0: about any */
    ul arguments_changed; /* C_Sign when the arguments of C_Initialize are not what they were */
};
enum { ABORT = 0x40000001UL, HANG = 0x40000002UL };
enum { INITIALIZE = 0, FINALIZE = 1, TOKEN_INFO = 6, OPEN = 12, CLOSE = 13, CLOSE_ALL = 14, LOGIN = 18,
       SLOT_INFO = 5, SIGN = 43 };

static struct { unsigned char version[2]; function f[FUNCTIONS]; } list, *real;
static struct state *state;

static ul *arguments, kept[6];

#ifdef OWN_CONTEXT /* an OpenSSL library context of the module's own, as opencryptoki has */
static void *context;
static void in_context(int i) {
    static void *(*make)(void), (*end)(void *);
    static int (*random)(void *, unsigned char *, size_t, unsigned);
    unsigned char octets[16];
    if (!make) {
        void *crypto = dlopen("libcrypto.so.3", RTLD_NOW);
        if (!crypto) abort();
        make = (void *(*)(void))dlsym(crypto, "OSSL_LIB_CTX_new");
        end = (void (*)(void *))dlsym(crypto, "OSSL_LIB_CTX_free");
        random = (int (*)(void *, unsigned char *, size_t, unsigned))dlsym(crypto, "RAND_bytes_ex");
    }
    if (i == INITIALIZE && !context) context = make();
    if (i == SIGN && context) random(context, octets, sizeof octets, 0);
    if (i == FINALIZE && context) { end(context); context = NULL; }
}
#endif

static ul before(int i, ul a, ul b) {
    __atomic_add_fetch(&state->calls[i], 1, __ATOMIC_SEQ_CST);
    if (i == FINALIZE && __atomic_load_n(&state->inside, __ATOMIC_SEQ_CST))
        __atomic_add_fetch(&state->finalized_beside, 1, __ATOMIC_SEQ_CST);
    if (i == LOGIN) state->user_type = b;
    if (i == INITIALIZE && a && ((ul *)a)[4] & 2) state->inits_os_locking++;
    if (i == INITIALIZE && a) {
        arguments = (ul *)a;
        for (int n = 0; n < 6; n++) kept[n] = arguments[n];
    }
    if (i == SIGN && arguments)
        for (int n = 0; n < 6; n++) state->arguments_changed += kept[n] != arguments[n];
    if (i == FINALIZE && state->heals)
        for (int n = 0; n < FUNCTIONS; n++) state->fault[n] = 0;
    if (i == OPEN && state->limit && state->sessions >= state->limit) return 0xb1;
    if ((i == SLOT_INFO || i == TOKEN_INFO) && state->only_slot && a != state->only_slot) return 0;
    ul fault = __atomic_load_n(&state->fault[i], __ATOMIC_SEQ_CST);
    ul times = __atomic_load_n(&state->times[i], __ATOMIC_SEQ_CST);
    while (fault && times && !__atomic_compare_exchange_n(
        &state->times[i], &times, times - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    if (!fault || !times) return 0;
    if (fault == ABORT) abort();
    if (fault == HANG) {
        while (__atomic_load_n(&state->fault[i], __ATOMIC_SEQ_CST) == HANG) usleep(1000);
        return 0;
    }
    return fault;
}

static ul call(int i, ul a, ul b, ul c, ul d, ul e, ul f, ul g, ul h) {
    __atomic_add_fetch(&state->inside, i != FINALIZE, __ATOMIC_SEQ_CST);
    ul rv = before(i, a, b);
#ifdef OWN_CONTEXT
    if (!rv) in_context(i);
#endif
    if (!rv) {
        if (i == LOGIN && !c && getenv("SHIM_PIN")) { /* the PIN pad */
            c = (ul)getenv("SHIM_PIN");
            for (d = 0; ((char *)c)[d]; d++) {}
        }
        rv = real->f[i](a, b, c, d, e, f, g, h);
        if (!rv && i == TOKEN_INFO) ((ul *)(b + 96))[0] |= state->token_flags;
        if (!rv && i == OPEN) {
            ul now = __atomic_add_fetch(&state->sessions, 1, __ATOMIC_SEQ_CST);
            if (now > state->most_sessions) state->most_sessions = now;
        }
        if (!rv && i == CLOSE) __atomic_sub_fetch(&state->sessions, 1, __ATOMIC_SEQ_CST);
        if (!rv && (i == FINALIZE || i == CLOSE_ALL)) state->sessions = 0;
    }
    __atomic_sub_fetch(&state->inside, i != FINALIZE, __ATOMIC_SEQ_CST);
    return rv;
}

#define T(i) static ul t##i(ul a, ul b, ul c, ul d, ul e, ul f, ul g, ul h) \
    { return call(i, a, b, c, d, e, f, g, h); }
#define TEN(x) T(x##0) T(x##1) T(x##2) T(x##3) T(x##4) T(x##5) T(x##6) T(x##7) T(x##8) T(x##9)
T(0) T(1) T(2) T(3) T(4) T(5) T(6) T(7) T(8) T(9)
TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) T(60) T(61) T(62) T(63) T(64) T(65) T(66) T(67)
#define R(x) t##x##0, t##x##1, t##x##2, t##x##3, t##x##4, t##x##5, t##x##6, t##x##7, t##x##8, t##x##9
static const function thunks[FUNCTIONS] = {
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, R(1), R(2), R(3), R(4), R(5),
    t60, t61, t62, t63, t64, t65, t66, t67};

ul C_GetFunctionList(void **answer) {
    if (!real) {
        void *library = dlopen(getenv("SHIM_MODULE"), RTLD_NOW | RTLD_LOCAL);
        int file = open(getenv("SHIM_STATE"), O_RDWR | O_CLOEXEC);
        if (!library || file < 0) return 5;
        ul (*get)(void **) = (ul (*)(void **))dlsym(library, "C_GetFunctionList");
        state = mmap(0, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        if (!get || state == MAP_FAILED || get((void **)&real)) return 5;
        list.version[0] = 2;
        list.version[1] = 40;
        for (int i = 0; i < FUNCTIONS; i++) list.f[i] = thunks[i];
    }
    *answer = &list;
    return 0;
}
