// Preloaded: numbers the calls of a process on files below one folder, and has one of them go wrong.
//
// A library and not a patch of Python's functions, so that it meets the calls of every library too. What a fault is, disk.py
// says. Build: cc -shared -fPIC -O1 -o faulty_disk.so faulty_disk.c -ldl

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum fault { NONE, KILL_BEFORE, KILL_AFTER, TORN, POWER, SHORT, ERROR, FULL, SIGNAL };

enum { MAX_FILES = 4096 };

// A file with bytes that are not on the disk yet; `held` is a descriptor of its own, so that a closed one is known too.
struct unsynced {
    dev_t device;
    ino_t inode;
    off_t synced;
    int held;
};

static char folder[PATH_MAX];
static size_t folder_length;
static pid_t owner;  // 0: nothing is counted
static enum fault fault;
static int fault_value;  // an errno, or a signal
static long fault_at, num_calls;
static bool is_full;
static struct unsynced files[MAX_FILES];
static int num_files;
static FILE *calls;  // names of the calls, where they are asked for
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name)                                         \
    static __typeof__(&name) real;                         \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

// Begin to count the calls on what lies in `path`; call `at`, counted from 0, gets the fault.
void faulty_disk_begin(const char *path, int kind, int value, long at, const char *list) {
    folder_length = strlen(path);
    memcpy(folder, path, folder_length + 1);
    fault = kind;
    fault_value = value;
    fault_at = at;
    num_calls = 0;
    num_files = 0;
    is_full = false;
    calls = list ? fopen(list, "w") : NULL;
    if (calls) setvbuf(calls, NULL, _IOLBF, 0);
    owner = getpid();
}

// Return the number of calls so far, and count no more.
long faulty_disk_end(void) {
    owner = 0;
    return num_calls;
}

static bool is_below(const char *path) {
    return !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

static bool is_descriptor_below(int descriptor) {
    char link[32], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return false;
    path[length] = 0;
    return is_below(path);
}

static bool is_path_below(int directory, const char *path) {
    if (path[0] == '/') return is_below(path);
    return directory != AT_FDCWD && is_descriptor_below(directory);
}

// Return where a file stands in the table, `num_files` where it does not.
static int find_file(const struct stat *status) {
    for (int i = 0; i < num_files; i++)
        if (files[i].inode == status->st_ino && files[i].device == status->st_dev) return i;
    return num_files;
}

// Note that a file is about to be written.
static void note_write(int descriptor) {
    struct stat status;
    if (fault != POWER || fstat(descriptor, &status) || !S_ISREG(status.st_mode)) return;
    int i = find_file(&status);
    if (i < num_files || num_files == MAX_FILES) return;
    int held = fcntl(descriptor, F_DUPFD_CLOEXEC, 500);
    files[num_files++] = (struct unsynced){status.st_dev, status.st_ino, status.st_size, held};
}

static void note_sync(int descriptor) {
    struct stat status;
    if (fault != POWER || fstat(descriptor, &status)) return;
    int i = find_file(&status);
    if (i < num_files) files[i].synced = status.st_size;
}

// Die; after a loss of power a third is left of what was not on the disk.
static void die(void) {
    for (int i = 0; fault == POWER && i < num_files; i++) {
        struct stat status;
        if (fstat(files[i].held, &status) || status.st_size <= files[i].synced) continue;
        off_t left = files[i].synced + (status.st_size - files[i].synced) / 3;
        if (ftruncate(files[i].held, left)) continue;
    }
    kill(getpid(), SIGKILL);
}

// Count a call; return whether it is the one that goes wrong after it has begun. With errno set it has failed already.
static bool goes_wrong(const char *name, const char *path, int descriptor, bool takes_room) {
    errno = 0;
    if (calls) {
        char link[32], shown[PATH_MAX];
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t length = path ? -1 : readlink(link, shown, sizeof shown - 1);
        shown[length < 0 ? 0 : length] = 0;
        fprintf(calls, "%s %s\n", name, path ? path : shown);
    }
    pthread_mutex_lock(&mutex);
    bool is_it = num_calls++ == fault_at;
    pthread_mutex_unlock(&mutex);
    if (is_it) {
        if (fault == KILL_BEFORE || fault == POWER) die();
        if (fault == SIGNAL) raise(fault_value);
        if (fault == FULL) is_full = true;
        if (fault == ERROR) errno = fault_value;
    }
    if (is_full && takes_room) errno = fault_value;
    return is_it && !errno;
}

static void end_call(bool is_it) {
    int kept = errno;
    if (is_it && fault == KILL_AFTER) die();
    errno = kept;
}

// One call of the system on a path or a descriptor.
#define CALL(is_ours, name, path, descriptor, takes_room, result, ...)               \
    if (owner != getpid() || !(is_ours)) return real(__VA_ARGS__);                   \
    bool is_it = goes_wrong(name, path, descriptor, takes_room);                     \
    if (errno) return -1;                                                            \
    result value = real(__VA_ARGS__);                                                \
    end_call(is_it);                                                                 \
    return value

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        REAL(name);                                                                  \
        va_list list;                                                                \
        va_start(list, flags);                                                       \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;      \
        va_end(list);                                                                \
        CALL(is_path_below(AT_FDCWD, path), "open", path, -1, flags & O_CREAT, int, path, flags, mode); \
    }

#define OPENAT(name)                                                                 \
    int name(int directory, const char *path, int flags, ...) {                      \
        REAL(name);                                                                  \
        va_list list;                                                                \
        va_start(list, flags);                                                       \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;      \
        va_end(list);                                                                \
        CALL(is_path_below(directory, path), "open", path, -1, flags & O_CREAT, int, directory, path, flags, \
             mode);                                                                  \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int descriptor, void *bytes, size_t size) {
    REAL(read);
    CALL(is_descriptor_below(descriptor), "read", NULL, descriptor, false, ssize_t, descriptor, bytes, size);
}

ssize_t write(int descriptor, const void *bytes, size_t size) {
    REAL(write);
    if (owner != getpid() || !is_descriptor_below(descriptor)) return real(descriptor, bytes, size);
    note_write(descriptor);
    bool is_it = goes_wrong("write", NULL, descriptor, true);
    if (errno) return -1;
    if (is_it && (fault == TORN || fault == SHORT) && size > 1) size /= 2;
    ssize_t value = real(descriptor, bytes, size);
    if (is_it && fault == TORN) die();
    end_call(is_it);
    return value;
}

int close(int descriptor) {
    REAL(close);
    if (owner != getpid() || !is_descriptor_below(descriptor)) return real(descriptor);
    bool is_it = goes_wrong("close", NULL, descriptor, false);
    int failed = errno;
    int value = real(descriptor);  // it is closed, whatever is said
    if (failed) {
        errno = failed;
        return -1;
    }
    end_call(is_it);
    return value;
}

int fsync(int descriptor) {
    REAL(fsync);
    if (owner != getpid() || !is_descriptor_below(descriptor)) return real(descriptor);
    bool is_it = goes_wrong("fsync", NULL, descriptor, false);
    if (errno) return -1;
    // What it does is up to `die` here: the disk itself would only take time.
    note_sync(descriptor);
    end_call(is_it);
    return 0;
}

int ftruncate64(int descriptor, off64_t size) {
    REAL(ftruncate64);
    CALL(is_descriptor_below(descriptor), "truncate", NULL, descriptor, false, int, descriptor, size);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    CALL(is_below(to), "rename", to, -1, false, int, from, to);
}

int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    REAL(renameat);
    CALL(is_path_below(to_directory, to), "rename", to, -1, false, int, from_directory, from, to_directory, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    CALL(is_below(path), "mkdir", path, -1, true, int, path, mode);
}

int unlink(const char *path) {
    REAL(unlink);
    CALL(is_below(path), "unlink", path, -1, false, int, path);
}

int unlinkat(int directory, const char *path, int flags) {
    REAL(unlinkat);
    CALL(is_path_below(directory, path), flags & AT_REMOVEDIR ? "rmdir" : "unlink", path, -1, false, int, directory, path,
         flags);
}

int rmdir(const char *path) {
    REAL(rmdir);
    CALL(is_below(path), "rmdir", path, -1, false, int, path);
}
