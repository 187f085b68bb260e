// Runs a command and says what it took: its exit code, its peak of memory in bytes, and the time until its end in nanoseconds.
// A small program, for a child that was just forked counts with the memory of its parent.
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int main(int count, char **arguments) {
    struct timespec began, ended;
    struct rusage usage;
    int status;
    if (count < 2) {
        return 1;
    }
    clock_gettime(CLOCK_MONOTONIC, &began);
    pid_t child = vfork();
    if (child == 0) {
        execv(arguments[1], arguments + 1);
        _exit(127);
    }
    if (child < 0 || wait4(child, &status, 0, &usage) != child || !WIFEXITED(status)) {
        return 1;
    }
    clock_gettime(CLOCK_MONOTONIC, &ended);
    long long took = (ended.tv_sec - began.tv_sec) * 1000000000LL + ended.tv_nsec - began.tv_nsec;
    printf("%d %ld %lld\n", WEXITSTATUS(status), usage.ru_maxrss * 1024, took);
    return 0;
}
