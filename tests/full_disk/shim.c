/* Preloaded, it lets the n-th change below a folder fail, native libraries' too, as on a full disk.

   A change: bytes written, a file, folder or link made, a file's length set, a flush, and, where the
   disk is not full for good, a rename. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long fails_at, seen;
static int stays_full, number;

/* below: count what is changed below it, empty: nothing. at: which one fails, 0: none. stays: all that
   come later fail, too, and half of what should be written at the n-th is. */
void arm(const char *below, long at, int stays, int error) {
    strcpy(root, below);
    fails_at = at;
    stays_full = stays;
    number = error;
    seen = 0;
}

long counted(void) { return seen; }

static int is_below(const char *path) {
    return *root && strncmp(path, root, strlen(root)) == 0;
}

static int is_named_below(const char *path) {
    char whole[PATH_MAX];
    if (!*root) return 0;
    if (*path != '/') {
        if (!getcwd(whole, sizeof whole)) return 0;
        strcat(strcat(whole, "/"), path);
        return is_below(whole);
    }
    return is_below(path);
}

static int is_open_below(int file) {
    char link[64], path[PATH_MAX];
    if (!*root) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

/* 0: goes on; 1: fails; 2: is the one at which a full disk has room for a half. */
static int fails(int concerned) {
    if (!concerned) return 0;
    seen++;
    if (!fails_at || seen < fails_at || (seen > fails_at && !stays_full)) return 0;
    errno = number;
    return stays_full && seen == fails_at && number == ENOSPC ? 2 : 1;
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *bytes, size_t count) {
    int how = fails(is_open_below(file));
    if (how == 1 || (how == 2 && count < 2)) return errno = number, -1;
    return REAL(write)(file, bytes, how == 2 ? count / 2 : count);
}

ssize_t pwrite(int file, const void *bytes, size_t count, off_t at) {
    return fails(is_open_below(file)) ? -1 : REAL(pwrite)(file, bytes, count, at);
}

ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t at) {
    return fails(is_open_below(file)) ? -1 : REAL(pwrite64)(file, bytes, count, at);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    return fails(is_open_below(file)) ? -1 : REAL(writev)(file, parts, count);
}

ssize_t sendfile(int to, int from, off_t *at, size_t count) {
    if (fails(is_open_below(to))) return -1;
    return ((ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile"))(to, from, at, count);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t count) {
    return sendfile(to, from, at, count);
}

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *into, size_t count, unsigned flags) {
    if (fails(is_open_below(to))) return -1;
    return REAL(copy_file_range)(from, at, to, into, count, flags);
}

int ftruncate(int file, off_t length) {
    return fails(length && is_open_below(file)) ? -1 : REAL(ftruncate)(file, length);
}

int ftruncate64(int file, off64_t length) {
    return fails(length && is_open_below(file)) ? -1 : REAL(ftruncate64)(file, length);
}

int posix_fallocate(int file, off_t at, off_t length) {
    return fails(is_open_below(file)) ? number : REAL(posix_fallocate)(file, at, length);
}

/* What really is on the disk is of no interest here, and takes time. */
int fsync(int file) { return fails(is_open_below(file)) ? -1 : 0; }

int fdatasync(int file) { return fsync(file); }

int mkdir(const char *path, mode_t mode) {
    int is_new = is_named_below(path) && access(path, F_OK);
    return fails(is_new) ? -1 : REAL(mkdir)(path, mode);
}

int link(const char *from, const char *to) {
    return fails(is_named_below(to)) ? -1 : REAL(link)(from, to);
}

int linkat(int from_in, const char *from, int to_in, const char *to, int flags) {
    return fails(is_named_below(to)) ? -1 : REAL(linkat)(from_in, from, to_in, to, flags);
}

int rename(const char *from, const char *to) {
    return fails(!stays_full && is_named_below(to)) ? -1 : REAL(rename)(from, to);
}

int renameat(int from_in, const char *from, int to_in, const char *to) {
    int concerned = !stays_full && is_named_below(to);
    return fails(concerned) ? -1 : REAL(renameat)(from_in, from, to_in, to);
}

static int makes(const char *path, int flags) {
    return flags & O_CREAT && is_named_below(path) && access(path, F_OK);
}

#define OPENING(name, given)                                 \
    va_list rest;                                            \
    va_start(rest, flags);                                   \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                            \
    return fails(makes(path, flags)) ? -1 : REAL(name) given;

int open(const char *path, int flags, ...) { OPENING(open, (path, flags, mode)) }
int open64(const char *path, int flags, ...) { OPENING(open64, (path, flags, mode)) }
int openat(int in, const char *path, int flags, ...) { OPENING(openat, (in, path, flags, mode)) }
int openat64(int in, const char *path, int flags, ...) { OPENING(openat64, (in, path, flags, mode)) }
