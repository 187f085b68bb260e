// Faults of the box, on command: a library that the loader puts before libc (LD_PRELOAD).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

// The wall clock is off by as many seconds as the file FAULT_CLOCK says; the steady clock goes on.
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    char seconds[32] = "";
    int file = result == 0 && clock == CLOCK_REALTIME ? open(getenv("FAULT_CLOCK"), O_RDONLY) : -1;
    if (file >= 0) {
        if (read(file, seconds, sizeof seconds - 1) > 0) {
            now->tv_sec += atoll(seconds);
        }
        close(file);
    }
    return result;
}

// No thread starts while there is a file FAULT_THREADS, which grows by a byte for each that was refused.
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument) {
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
    int file = open(getenv("FAULT_THREADS"), O_WRONLY | O_APPEND);
    if (file < 0) {
        return real(thread, attributes, run, argument);
    }
    ssize_t noted = write(file, ".", 1);
    close(file);
    return noted == 1 ? EAGAIN : ENOMEM;
}
