/* A layer between a process and its files, by LD_PRELOAD: records what is done to the files under FAULTFS_ROOT into
 * FAULTFS_LOG, and fails calls as the file FAULTFS_CONTROL says, for as long as it exists: lines of "<call> <errno>",
 * where a call is write, sync, open (for writing) or name (rename, link, unlink).
 *
 * A record is: kind (u8), inode (u64), offset (u64), length of path, of second path, of data (u32 each), then these.
 * Kinds: C create, W write, T truncate, S sync of a file, D sync of a folder, R rename, L link, U unlink.
 * Knows nothing of what the bytes mean. Memory-mapped writes are not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_FDS 4096
static char *paths[MAX_FDS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *root, *control;
static int log_fd = -1;

__attribute__((constructor)) static void start(void) {
  root = getenv("FAULTFS_ROOT");
  control = getenv("FAULTFS_CONTROL");
  const char *log = getenv("FAULTFS_LOG");
  if (log) log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static int ours(const char *path) { return root && path && !strncmp(path, root, strlen(root)); }

static const char *path_of(int fd) { return fd >= 0 && fd < MAX_FDS ? paths[fd] : NULL; }

static int failing(const char *call) {
  if (!control) return 0;
  int fd = syscall(SYS_openat, AT_FDCWD, control, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  char text[256];
  ssize_t length = syscall(SYS_read, fd, text, sizeof text - 1);
  syscall(SYS_close, fd);
  text[length > 0 ? length : 0] = 0;
  char *line, *rest = text;
  while ((line = strsep(&rest, "\n"))) {
    char name[32];
    int number;
    if (sscanf(line, "%31s %d", name, &number) == 2 && !strcmp(name, call)) return number;
  }
  return 0;
}

static uint64_t inode_of(int fd) {
  struct stat found;
  return fstat(fd, &found) ? 0 : found.st_ino;
}

static void record(char kind, uint64_t inode, uint64_t offset, const char *one, const char *two, const void *data,
                   size_t length) {
  if (log_fd < 0) return;
  uint32_t sizes[3] = {one ? strlen(one) : 0, two ? strlen(two) : 0, length};
  struct iovec parts[] = {{&kind, 1},           {&inode, 8},          {&offset, 8},         {sizes, 12},
                          {(void *)one, sizes[0]}, {(void *)two, sizes[1]}, {(void *)data, length}};
  if (syscall(SYS_writev, log_fd, parts, 7) < 0) abort();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(call) \
  do { int number = failing(call); if (number) { errno = number; return -1; } } while (0)

static int opened(int fd, const char *path, int flags, int existed) {
  if (fd < 0 || fd >= MAX_FDS) return fd;
  free(paths[fd]);
  paths[fd] = ours(path) ? strdup(path) : NULL;
  if (paths[fd] && !(flags & O_DIRECTORY)) {
    if ((flags & O_CREAT) && !existed) record('C', inode_of(fd), 0, path, NULL, NULL, 0);
    else if (flags & O_TRUNC) record('T', inode_of(fd), 0, path, NULL, NULL, 0);
  }
  return fd;
}

#define OPEN_BODY(call)                                                     \
  int mode = 0;                                                             \
  if (flags & (O_CREAT | O_TMPFILE)) {                                      \
    va_list list; va_start(list, flags); mode = va_arg(list, int); va_end(list); \
  }                                                                         \
  if (!ours(path)) return opened(call, path, flags, 1);                     \
  if (flags & (O_WRONLY | O_RDWR | O_CREAT)) FAIL("open");                  \
  pthread_mutex_lock(&lock);                                                \
  struct stat found;                                                        \
  int existed = !stat(path, &found);                                        \
  int fd = opened(call, path, flags, existed);                              \
  pthread_mutex_unlock(&lock);                                              \
  return fd;

int open(const char *path, int flags, ...) { OPEN_BODY(REAL(open)(path, flags, mode)) }
int open64(const char *path, int flags, ...) { OPEN_BODY(REAL(open64)(path, flags, mode)) }
int openat(int at, const char *path, int flags, ...) { OPEN_BODY(REAL(openat)(at, path, flags, mode)) }
int openat64(int at, const char *path, int flags, ...) { OPEN_BODY(REAL(openat64)(at, path, flags, mode)) }

int close(int fd) {
  if (fd >= 0 && fd < MAX_FDS) { free(paths[fd]); paths[fd] = NULL; }
  return REAL(close)(fd);
}

#define WRITE_BODY(call, at)                                                              \
  if (!path_of(fd)) return call;                                                          \
  FAIL("write");                                                                          \
  pthread_mutex_lock(&lock);                                                              \
  uint64_t where = at;                                                                    \
  ssize_t done = call;                                                                    \
  if (done > 0) record('W', inode_of(fd), where, path_of(fd), NULL, data, done);          \
  pthread_mutex_unlock(&lock);                                                            \
  return done;

ssize_t write(int fd, const void *data, size_t n) { WRITE_BODY(REAL(write)(fd, data, n), lseek(fd, 0, SEEK_CUR)) }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { WRITE_BODY(REAL(pwrite)(fd, data, n, at), at) }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { WRITE_BODY(REAL(pwrite64)(fd, data, n, at), at) }

#define SYNC_BODY(call)                                                                        \
  if (!path_of(fd)) return call;                                                               \
  FAIL("sync");                                                                                \
  pthread_mutex_lock(&lock);                                                                   \
  struct stat found;                                                                           \
  int folder = !fstat(fd, &found) && S_ISDIR(found.st_mode);                                   \
  int done = call;                                                                             \
  if (!done) record(folder ? 'D' : 'S', found.st_ino, 0, path_of(fd), NULL, NULL, 0);          \
  pthread_mutex_unlock(&lock);                                                                 \
  return done;

int fsync(int fd) { SYNC_BODY(REAL(fsync)(fd)) }
int fdatasync(int fd) { SYNC_BODY(REAL(fdatasync)(fd)) }

#define TRUNCATE_BODY(call)                                                        \
  if (!path_of(fd)) return call;                                                   \
  FAIL("write");                                                                   \
  pthread_mutex_lock(&lock);                                                       \
  int done = call;                                                                 \
  if (!done) record('T', inode_of(fd), length, path_of(fd), NULL, NULL, 0);        \
  pthread_mutex_unlock(&lock);                                                     \
  return done;

int ftruncate(int fd, off_t length) { TRUNCATE_BODY(REAL(ftruncate)(fd, length)) }
int ftruncate64(int fd, off64_t length) { TRUNCATE_BODY(REAL(ftruncate64)(fd, length)) }

#define NAME_BODY(kind, call, one, two)                          \
  if (!ours(one)) return call;                                   \
  FAIL("name");                                                  \
  pthread_mutex_lock(&lock);                                     \
  int done = call;                                               \
  if (!done) record(kind, 0, 0, one, two, NULL, 0);              \
  pthread_mutex_unlock(&lock);                                   \
  return done;

int rename(const char *from, const char *to) { NAME_BODY('R', REAL(rename)(from, to), from, to) }
int link(const char *from, const char *to) { NAME_BODY('L', REAL(link)(from, to), from, to) }
int unlink(const char *path) { NAME_BODY('U', REAL(unlink)(path), path, NULL) }
