// Faults of the box, on command: a library that the loader puts before libc (LD_PRELOAD).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/file.h>
#include <sys/stat.h>
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

// Names that end in ".test" resolve to this machine. A lookup does not end while the file FAULT_LOOKUPS exists, which grows by one
// byte for each lookup.
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

// Connections to the port of this machine before the colon in FAULT_PORT go to the port behind it.
int connect(int socket, const struct sockaddr *address, socklen_t length) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    const char *ports = getenv("FAULT_PORT");
    struct sockaddr_in redirected;
    if (ports && address->sa_family == AF_INET && ntohs(((struct sockaddr_in *)address)->sin_port) == atoi(ports)) {
        memcpy(&redirected, address, sizeof redirected);
        redirected.sin_port = htons(atoi(strchr(ports, ':') + 1));
        address = (struct sockaddr *)&redirected;
    }
    return real(socket, address, length);
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

// The errno in the file that the variable names; 0 without that file.
static int fault(const char *variable) {
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    char number[16] = "";
    int file = real(getenv(variable), O_RDONLY | O_CLOEXEC);
    if (file < 0) {
        return 0;
    }
    ssize_t length = read(file, number, sizeof number - 1);
    close(file);
    return length > 0 ? atoi(number) : 0;
}

// With FAULT_DISK, nothing beside the identity can be written or created, as on a disk that has become read-only or fails.
static int fails(const char *path, int is_write) {
    int number = is_write && path && strstr(path, "/identity.key") ? fault("FAULT_DISK") : 0;
    errno = number ? number : errno;
    return number;
}

static int descriptor_fails(int file) {
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    return length > 0 && fails(path, 1);
}

int open64(const char *path, int flags, ...) {
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return fails(path, (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0) ? -1 : real(path, flags, mode);
}

ssize_t pwrite64(int file, const void *bytes, size_t length, off64_t at) {
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    return descriptor_fails(file) ? -1 : real(file, bytes, length, at);
}

int ftruncate64(int file, off64_t length) {
    int (*real)(int, off64_t) = dlsym(RTLD_NEXT, "ftruncate64");
    return descriptor_fails(file) ? -1 : real(file, length);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return fails(to, 1) ? -1 : real(from, to);
}

int unlink(const char *path) {
    int (*real)(const char *) = dlsym(RTLD_NEXT, "unlink");
    return fails(path, 1) ? -1 : real(path);
}

// With FAULT_LOCK, no file can be locked, as on NFS without a lock manager.
int flock(int file, int operation) {
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    int number = operation & LOCK_UN ? 0 : fault("FAULT_LOCK");
    if (number) {
        errno = number;
        return -1;
    }
    return real(file, operation);
}
