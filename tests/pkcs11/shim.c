/* SPDX-License-Identifier: Apache-2.0
 *
 * A PKCS#11 module in front of another one (SHIM_MODULE), for tests: it counts calls and sessions,
 * notices a C_Finalize beside another call, and fails, hangs or aborts on request. What to do and
 * what was seen stands in a file that the test and this module map (SHIM_STATE), the environment of
 * the process in another one (SHIM_SEES); see shim.py.
 *
 * SHIM_SCRIPT, looked at in each call, changes single answers. Directives with blanks between them,
 * numbers in hexadecimal:
 *   attr:A[/O]=rv:C     attribute A (of objects of class O) answers C, its length "unavailable"
 *   attr:A[/O]=raw:C    ... answers C and leaves the length alone
 *   attr:A[/O]=len      ... answers CKR_OK beside the length "unavailable"
 *   attr:A[/O]=small    ... answers CKR_BUFFER_TOO_SMALL to the question for its length
 *   attr:A[/O]=HEX      ... has this value
 *   sign=der|pad|short|once|room|cut   form of the signature; short: 63 bytes of it; once: only the
 *                       first time; room: C_Sign wants a buffer of 512 bytes; cut: sign.cut=N bytes of it
 *   state=N             state that C_GetSessionInfo tells
 *   token.label=HEX     label, filled up with NUL    token.set=F token.clear=F   flags
 *   token.serial=HEX    serial number, likewise
 *   slot.empty          one slot more, whose token is not initialised
 *   slot.grow=N         the list of slots is longer than was told, N times; slot.shrink: shorter
 *   slot.count=N        C_GetSlotList tells so many slots: to the question for their number;
 *   slot.more=N         ... beside the list
 *   find.count=N        C_FindObjects tells so many objects; find.zero: the first one's handle is 0
 *   null=F              function F is not in the list (read when the module is loaded)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

typedef unsigned char u8;
struct attribute { ul type; u8 *value; ul length; };
enum { FIND = 27, SLOT_LIST = 4, SESSION_INFO = 15, ATTRIBUTES = 24 };
enum { TOO_SMALL = 0x150, EMPTY_SLOT = 0x7777 };

/* What follows a directive's name, or NULL. */
static const char *told(const char *name) {
    static _Thread_local char word[4096];
    size_t n = strlen(name);
    for (const char *p = getenv("SHIM_SCRIPT"); p && *p;) {
        p += strspn(p, " ");
        size_t length = strcspn(p, " ");
        if (length >= n && !strncmp(p, name, n) && length - n < sizeof word) {
            memcpy(word, p + n, length - n);
            word[length - n] = 0;
            return word;
        }
        p += length;
    }
    return NULL;
}
static ul number(const char *name) { const char *t = told(name); return t ? strtoul(t, 0, 16) : 0; }
static size_t unhex(const char *t, u8 *out, size_t most) {
    size_t n = 0;
    for (; t[0] && t[1] && n < most; t += 2) { char b[3] = {t[0], t[1], 0}; out[n++] = (u8)strtoul(b, 0, 16); }
    return n;
}
static ul attributes(ul s, ul o, struct attribute *a, ul n) {
    ul class = ~0ul, worst = 0;
    struct attribute c = {0, (u8 *)&class, sizeof class};
    real->f[ATTRIBUTES](s, o, (ul)&c, 1, 0, 0, 0, 0);
    for (ul i = 0; i < n; i++) {
        char name[48];
        snprintf(name, sizeof name, "attr:%lx/%lx=", a[i].type, class);
        const char *t = told(name);
        snprintf(name, sizeof name, "attr:%lx=", a[i].type);
        if (!t) t = told(name);
        if (!t || !strcmp(t, "small")) {
            int small = t && !a[i].value;
            ul rv = real->f[ATTRIBUTES](s, o, (ul)&a[i], 1, 0, 0, 0, 0);
            if (rv || small) worst = rv ? rv : TOO_SMALL;
        } else if (!strncmp(t, "raw:", 4)) {
            worst = strtoul(t + 4, 0, 16);
        } else if (!strncmp(t, "rv:", 3) || !strcmp(t, "len")) {
            if (*t == 'r') worst = strtoul(t + 3, 0, 16);
            a[i].length = ~0ul;
        } else {
            u8 value[1024];
            ul length = unhex(t, value, sizeof value), room = a[i].length;
            a[i].length = length;
            if (a[i].value && room < length) { a[i].length = ~0ul; worst = TOO_SMALL; }
            else if (a[i].value) memcpy(a[i].value, value, length);
        }
    }
    return worst;
}
static size_t integer(u8 *out, const u8 *x) {
    size_t n = 32;
    for (; n > 1 && !*x; x++) n--;
    size_t pad = *x >= 0x80;
    out[0] = 2; out[1] = (u8)(n + pad); out[2] = 0;
    memcpy(out + 2 + pad, x, n);
    return 2 + pad + n;
}
static ul signature(const char *form, ul s, ul d, ul n, u8 *out, ul *length) {
    u8 raw[256], made[256] = {0};
    ul room = *length, k = sizeof raw;
    if (!strcmp(form, "room") && room < 512) return TOO_SMALL; /* the length is not told */
    ul rv = real->f[SIGN](s, d, n, (ul)raw, (ul)&k, 0, 0, 0);
    if (rv) return rv;
    memcpy(made, raw, k);
    if (!strcmp(form, "der")) {
        size_t r = integer(made + 2, raw), both = r + integer(made + 2 + r, raw + 32);
        made[0] = 0x30; made[1] = (u8)both; k = 2 + both;
    } else if (!strcmp(form, "pad")) {
        memset(made, 0, 66); memcpy(made + 1, raw, 32); memcpy(made + 34, raw + 32, 32); k = 66;
    }
    if (!strcmp(form, "cut")) k = number("sign.cut=");
    static int once;
    if (!strcmp(form, "short") || (!strcmp(form, "once") && !once++)) k = 63;
    memcpy(out, made, k);
    *length = k;
    return 0;
}
static ul slots(ul present, ul *ids, ul *count) {
    static ul grown;
    ul inner[64], n = 64, room = *count;
    ul rv = real->f[SLOT_LIST](present, (ul)inner, (ul)&n, 0, 0, 0, 0, 0);
    if (rv) return rv;
    if (told("slot.empty")) inner[n++] = EMPTY_SLOT;
    if (!ids && told("slot.count=")) { *count = number("slot.count="); return 0; }
    if (ids && told("slot.more=")) { *count = number("slot.more="); return 0; }
    if (!ids) { *count = n + (told("slot.shrink") != NULL); return 0; }
    if (grown < number("slot.grow=")) { grown++; *count = n + 1; return TOO_SMALL; }
    *count = n;
    if (room < n) return TOO_SMALL;
    memcpy(ids, inner, n * sizeof(ul));
    return 0;
}
static ul answer(int i, ul a, ul b, ul c, ul d, ul e, ul f, ul g, ul h) {
    if (i == ATTRIBUTES && told("attr:")) return attributes(a, b, (struct attribute *)c, d);
    if (i == SIGN && told("sign=")) {
        char form[16];
        snprintf(form, sizeof form, "%s", told("sign="));
        return signature(form, a, b, c, (u8 *)d, (ul *)e);
    }
    if (i == SLOT_LIST && told("slot.")) return slots(a, (ul *)b, (ul *)c);
    if ((i == SLOT_INFO || i == TOKEN_INFO) && a == EMPTY_SLOT) {
        memset((void *)b, ' ', 96);
        memset((u8 *)b + 96, 0, i == SLOT_INFO ? 8 : 112);
        return 0;
    }
    ul rv = real->f[i](a, b, c, d, e, f, g, h);
    if (!rv && i == FIND && told("find.count=")) *(ul *)d = number("find.count=");
    if (!rv && i == FIND && told("find.zero") && *(ul *)d) *(ul *)b = 0;
    if (!rv && i == SESSION_INFO && told("state=")) ((ul *)b)[1] = number("state=");
    if (!rv && i == TOKEN_INFO) {
        const char *label = told("token.label=");
        if (label) { memset((u8 *)b, 0, 32); unhex(label, (u8 *)b, 32); }
        const char *serial = told("token.serial=");
        if (serial) { memset((u8 *)b + 80, 0, 16); unhex(serial, (u8 *)b + 80, 16); }
        *(ul *)(b + 96) |= number("token.set=");
        *(ul *)(b + 96) &= ~number("token.clear=");
    }
    return rv;
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
        rv = answer(i, a, b, c, d, e, f, g, h);
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

/* Nobody but root may read the environment of a process that leaves no core. */
static void tell_environment(void) {
    const char *path = getenv("SHIM_SEES");
    FILE *file = path && *path ? fopen(path, "w") : NULL;
    for (char **pair = environ; file && *pair; pair++) fwrite(*pair, strlen(*pair) + 1, 1, file);
    if (file) fclose(file);
}

ul C_GetFunctionList(void **answer) {
    if (!real) {
        tell_environment();
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
        if (told("null=")) list.f[number("null=")] = NULL;
    }
    *answer = &list;
    return 0;
}
