// Faults of the box, on command: a library that the loader puts before libc (LD_PRELOAD).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
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

// Names that end in ".test" are this machine. The lookup of a name does not end while there is a file FAULT_LOOKUPS, which grows
// by a byte for each lookup.
int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) = dlsym(RTLD_NEXT, "getaddrinfo");
    int file = open(getenv("FAULT_LOOKUPS"), O_WRONLY | O_APPEND);
    if (file >= 0) {
        ssize_t noted = write(file, ".", 1);
        close(file);
        while (noted == 1 && access(getenv("FAULT_LOOKUPS"), F_OK) == 0) {
            usleep(5000);
        }
    }
    size_t length = strlen(name);
    int is_here = length > 5 && strcmp(name + length - 5, ".test") == 0;
    return real(is_here ? "127.0.0.1" : name, service, hints, found);
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
