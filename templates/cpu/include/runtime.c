// The runtime core of every CPU binary: a pool of threads that runs the launches of one phase.
//
// A launch is one kernel, cut into shares. Threads claim shares one by one, and the thread that ends
// the last share opens the next launch. So nobody waits for a thread that has nothing in hand: one
// that is asleep, preempted by another program or on a slow core only does less. What a share
// computes does not depend on who computes it. Waiting threads spin, as the next launch is
// microseconds away, and then sleep in the kernel, as it may not come for seconds.
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define SPINS 1000  // about 30 us; longer only keeps a preempted thread off this core
#define SHARES_PER_THREAD 4
#define STACK_BYTES (16 << 20)  // kernels keep their tiles on the stack

typedef struct {
    void (*kernel)(void *const *args, int share, int n_shares);
    void *const *args;
} Launch;

typedef struct {
    // Number of the open launch, counted over all runs, << 32 | its next share. Claiming by
    // compare-and-swap makes sure that a thread which was away never claims under an old number.
    _Alignas(128) _Atomic uint64_t ticket;
    _Alignas(128) _Atomic uint32_t ended;  // shares of the open launch
    // Changes whenever a launch opens or a run ends: what threads without a share wait on.
    _Alignas(128) _Atomic uint32_t events;
    _Atomic uint32_t sleepers;
    _Alignas(128) const Launch *launches;  // of this run
    uint32_t first, count;                 // number of its first launch; how many
    int n_shares;
    int n_workers;  // threads beside the caller
    _Atomic int finished, stop;
    pthread_t workers[];
} Pool;

static void raise_event(Pool *pool) {
    // Both accesses are sequentially consistent: a sleeper is counted here, or sees the new value.
    atomic_fetch_add(&pool->events, 1);
    if (atomic_load(&pool->sleepers))
        syscall(SYS_futex, (uint32_t *)&pool->events, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void wait_event(Pool *pool, uint32_t seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool->events, memory_order_acquire) != seen) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        __asm__ volatile("isb");
#endif
    }
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->events) == seen)
        syscall(SYS_futex, (uint32_t *)&pool->events, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&pool->sleepers, 1);
}

static void open_launch(Pool *pool, uint32_t number) {
    atomic_store_explicit(&pool->ended, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->ticket, (uint64_t)number << 32, memory_order_release);
    raise_event(pool);
}

// Claims shares of open launches and runs them until there are none.
static void run_shares(Pool *pool) {
    for (;;) {
        uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
        const int share = (int)(uint32_t)ticket;
        if (share >= pool->n_shares) return;
        if (!atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, ticket + 1, memory_order_acq_rel,
                                                   memory_order_relaxed))
            continue;
        // From here until it ends the share holds its launch, and so its run, open.
        const uint32_t number = (uint32_t)(ticket >> 32);
        const Launch *launch = &pool->launches[number - pool->first];
        launch->kernel(launch->args, share, pool->n_shares);
        if (atomic_fetch_add_explicit(&pool->ended, 1, memory_order_acq_rel) + 1 != (uint32_t)pool->n_shares) continue;
        if (number + 1 - pool->first < pool->count) {
            open_launch(pool, number + 1);
        } else {
            atomic_store(&pool->finished, 1);
            raise_event(pool);
        }
    }
}

static void *work(void *argument) {
    Pool *pool = argument;
    for (;;) {
        const uint32_t seen = atomic_load(&pool->events);
        if (atomic_load(&pool->stop)) return NULL;
        run_shares(pool);
        wait_event(pool, seen);
    }
}

EXPORT void gqsa_pool_destroy(void *handle) {
    Pool *pool = handle;
    atomic_store(&pool->stop, 1);
    raise_event(pool);
    for (int i = 0; i < pool->n_workers; i++) pthread_join(pool->workers[i], NULL);
    free(pool);
}

// A pool of n_threads >= 1 threads, the caller of gqsa_run among them; NULL if they cannot be started.
EXPORT void *gqsa_pool_create(int n_threads) {
    Pool *pool = NULL;
    if (posix_memalign((void **)&pool, 128, sizeof(Pool) + (size_t)n_threads * sizeof(pthread_t))) return NULL;
    *pool = (Pool){.n_shares = n_threads == 1 ? 1 : n_threads * SHARES_PER_THREAD};
    atomic_store(&pool->ticket, (uint32_t)pool->n_shares);  // nothing to claim
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    int failed = 0;
    while (pool->n_workers < n_threads - 1 && !failed) {
        failed = pthread_create(&pool->workers[pool->n_workers], &attributes, work, pool);
        if (!failed) pool->n_workers++;
    }
    pthread_attr_destroy(&attributes);
    if (failed) {
        gqsa_pool_destroy(pool);
        return NULL;
    }
    return pool;
}

// Runs the launches in order and returns when the last is done. One caller at a time.
EXPORT void gqsa_run(void *handle, const Launch *launches, int count) {
    Pool *pool = handle;
    if (count <= 0) return;
    pool->launches = launches;
    pool->first += pool->count;
    pool->count = (uint32_t)count;
    atomic_store(&pool->finished, 0);
    open_launch(pool, pool->first);
    for (;;) {
        const uint32_t seen = atomic_load(&pool->events);
        run_shares(pool);
        if (atomic_load(&pool->finished)) return;
        wait_event(pool, seen);
    }
}
