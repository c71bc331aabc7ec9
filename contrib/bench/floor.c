/* The floor: what a container like our default one costs when nothing but its system calls is paid for.
 *
 * The same namespaces, control groups and mounts as `meso run -- true`, in the same order, from one small C process
 * that knows everything beforehand: no validation, no plan, no ledger, no socket, no barrier, no log files. Every
 * figure in RESULTS.md is divided by this one, measured in the same minute on the same machine.
 *
 * Once: a mount namespace whose root is an empty tmpfs, with /proc and a read-only view of the host (overlays).
 * Per container:   mkdir of the cgroups, limits · clone3(mount, pid, into the v2 cgroup) · v1 attach · one tmpfs in
 * six places, proc, devpts, the sandbox bind, Docker's masked and read-only paths · pivot_root · a user namespace, mapped by the
 * parent, and in it net, ipc and uts · host name, lo · bounding set, no_new_privs, ids · execve of `true` · wait ·
 * rmdir of the cgroups.
 *
 * Reads numbers from stdin, a line each: K starts K containers (all before waiting for any), waits for all, removes
 * all, and answers {"us": …}. "x N P": P processes launch N containers in all, one after the other each: {"us": …}.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/sched.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_GROUPS 8
#define MAX_AT_ONCE 256

struct hierarchy { /* one place where cgroups are made */
	int base, v2;
	const char *file, *limit; /* the limit that is set, if this hierarchy has one */
};
struct container {
	char name[32];
	int pid, pidfd, sandbox, v2, status[2], go[2], tasks[MAX_GROUPS];
};

static struct hierarchy groups[MAX_GROUPS];
static int group_count, rootless, sandboxes, null_fd;
static char run_name[64];
static const char *const scratch_at[] = {"tmp", "run", "home", "root", "var", "dev/shm"};
static const char *const masked[] = {"proc/asound", "proc/acpi", "proc/interrupts", "proc/kcore", "proc/keys",
	"proc/latency_stats", "proc/timer_list", "proc/timer_stats", "proc/sched_debug", "proc/scsi"};
static const char *const frozen[] = {"proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger"};
/* Docker's default set, by number: what stays in the bounding set. */
static const uint64_t kept = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 13
	| 1 << 18 | 1 << 27 | 1 << 29 | 1ull << 31;
#define COUNT(list) (sizeof list / sizeof *list)

static void check(int ok, const char *format, ...)
{
	if (ok)
		return;
	va_list list;
	va_start(list, format);
	fprintf(stderr, "floor: ");
	vfprintf(stderr, format, list);
	fprintf(stderr, ": %s\n", strerror(errno));
	_exit(1);
}

static void put(int directory, const char *file, const char *text)
{
	int fd = openat(directory, file, O_WRONLY | O_CLOEXEC);
	check(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), "write %s", file);
	close(fd);
}

static double now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* ---- once ---- */

static void add_group(const char *mount_point, const char *own, int v2, const char *file, const char *limit)
{
	char path[4096];
	snprintf(path, sizeof path, "%s%s/%s", mount_point, strcmp(own, "/") ? own : "", run_name);
	if (mkdir(path, 0755) && errno != EEXIST)
		return; /* an ordinary user: this hierarchy is not delegated */
	groups[group_count++] = (struct hierarchy){open(path, O_PATH | O_DIRECTORY | O_CLOEXEC), v2, file, limit};
}

static void find_groups(void)
{
	static const struct { const char *controller, *file, *limit; } limits[] = {
		{"cpu", "cpu.shares", "512"}, {"memory", "memory.limit_in_bytes", "67108864"}, {"pids", "pids.max", "64"}};
	char line[4096], mount_point[4096];
	FILE *own = fopen("/proc/self/cgroup", "re");
	while (own && fgets(line, sizeof line, own)) {
		char *controllers = strchr(line, ':') + 1, *path = strchr(controllers, ':');
		*path++ = 0;
		path[strcspn(path, "\n")] = 0;
		if (!*controllers) {
			int hybrid = access("/sys/fs/cgroup/unified/cgroup.procs", F_OK) == 0;
			int pure = access("/sys/fs/cgroup/cgroup.procs", F_OK) == 0;
			if (hybrid)
				add_group("/sys/fs/cgroup/unified", path, 1, NULL, NULL);
			else if (pure)
				add_group("/sys/fs/cgroup", path, 1, "pids.max", "64");
			continue;
		}
		for (unsigned i = 0; i < COUNT(limits); i++) {
			snprintf(mount_point, sizeof mount_point, "/sys/fs/cgroup/%s", limits[i].controller);
			if (!strcmp(controllers, limits[i].controller) && access(mount_point, F_OK) == 0)
				add_group(mount_point, path, 0, limits[i].file, limits[i].limit);
		}
	}
	if (own)
		fclose(own);
}

static void copy(const char *from, const char *to)
{
	char buffer[65536];
	ssize_t got;
	int in = open(from, O_RDONLY | O_CLOEXEC), out = open(to, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	while (in >= 0 && (got = read(in, buffer, sizeof buffer)) > 0)
		check(write(out, buffer, got) == got, "copy %s", from);
	close(in);
	close(out);
}

static void show(const char *name) /* one directory of the host in the view: a copy of a link, or an overlay */
{
	char source[64], target[64], options[256], link[256];
	snprintf(source, sizeof source, "/%s", name);
	snprintf(target, sizeof target, "view/%s", name);
	ssize_t length = readlink(source, link, sizeof link - 1);
	if (length > 0) {
		link[length] = 0;
		check(symlink(link, target) == 0, "symlink %s", target);
	} else if (access(source, F_OK) == 0) {
		snprintf(options, sizeof options, "lowerdir=%s:empty", source);
		check(mkdir(target, 0755) == 0 && mount("overlay", target, "overlay", MS_RDONLY, options) == 0, "overlay %s", source);
	}
}

static void device(const char *name, int minor)
{
	char source[64], target[64];
	snprintf(source, sizeof source, "/dev/%s", name);
	snprintf(target, sizeof target, "view/dev/%s", name);
	if (rootless) {
		close(open(target, O_CREAT | O_CLOEXEC, 0666));
		check(mount(source, target, NULL, MS_BIND, NULL) == 0, "bind %s", source);
	} else
		check(mknod(target, S_IFCHR | 0666, makedev(1, minor)) == 0 && chmod(target, 0666) == 0, "mknod %s", target);
}

static void build_womb(const char *where)
{
	static const char *const trees[] = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt"};
	static const char *const places[] = {"proc", "sys", "etc", "tmp", "run", "home", "root", "var", "sandbox", "dev"};
	char path[64];
	check(mount(NULL, "/", NULL, MS_PRIVATE | MS_REC, NULL) == 0, "private /");
	check(mount("tmpfs", where, "tmpfs", 0, "mode=755") == 0 && chdir(where) == 0, "tmpfs %s", where);
	check(!mkdir("proc", 0755) && !mkdir("old", 0755) && !mkdir("empty", 0755) && !mkdir("workshop", 0755) && !mkdir("view", 0755), "mkdir");
	check(mount("/proc", "proc", NULL, MS_BIND | MS_REC, NULL) == 0, "bind /proc");
	check(mount("tmpfs", "view", "tmpfs", 0, "mode=755") == 0, "tmpfs view");
	close(open("empty-file", O_CREAT | O_CLOEXEC, 0444));
	for (unsigned i = 0; i < COUNT(trees); i++)
		show(trees[i]);
	for (unsigned i = 0; i < COUNT(places); i++) {
		snprintf(path, sizeof path, "view/%s", places[i]);
		check(mkdir(path, 0755) == 0, "mkdir %s", path);
	}
	check(!mkdir("view/dev/pts", 0755) && !mkdir("view/dev/shm", 0755) && !mkdir("view/dev/mqueue", 0755), "mkdir dev");
	device("null", 3), device("zero", 5), device("full", 7), device("random", 8), device("urandom", 9);
	copy("/etc/ld.so.cache", "view/etc/ld.so.cache");
	copy("/etc/passwd", "view/etc/passwd");
	check(mount(NULL, "view", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL) == 0, "read-only view");
	check(syscall(SYS_pivot_root, ".", "old") == 0 && chdir("/") == 0 && umount2("/old", MNT_DETACH) == 0, "pivot_root");
}

/* ---- per container, in the child ---- */

static void lo_up(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	check(ioctl(fd, SIOCSIFFLAGS, &request) == 0, "lo up");
	close(fd);
}

static void become(struct container *c, const char *program)
{
	char byte;
	for (int i = 0; i < group_count; i++)
		if (c->tasks[i] >= 0)
			check(write(c->tasks[i], "0", 1) == 1, "attach");
	check(chdir("/view") == 0, "chdir view");
	char place[32];
	check(mount("tmpfs", "/workshop", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=256m") == 0, "tmpfs");
	for (unsigned i = 0; i < COUNT(scratch_at); i++) {
		snprintf(place, sizeof place, "/workshop/%u", i);
		check(mkdir(place, 0700) == 0 && chmod(place, 01777) == 0, "mkdir %s", place);
		check(mount(place, scratch_at[i], NULL, MS_BIND, NULL) == 0, "scratch %s", scratch_at[i]);
	}
	check(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0, "proc");
	check(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666") == 0, "devpts");
	check(syscall(SYS_move_mount, c->sandbox, "", AT_FDCWD, "sandbox", 4 /* MOVE_MOUNT_F_EMPTY_PATH */) == 0, "move_mount");
	for (unsigned i = 0; i < COUNT(masked); i++) {
		struct stat what;
		if (stat(masked[i], &what) == 0)
			check(mount(S_ISDIR(what.st_mode) ? "/empty" : "/empty-file", masked[i], NULL, MS_BIND, NULL) == 0, "mask %s", masked[i]);
	}
	for (unsigned i = 0; i < COUNT(frozen); i++)
		if (mount(frozen[i], frozen[i], NULL, MS_BIND, NULL) == 0)
			check(mount(NULL, frozen[i], NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0, "read-only");
	check(syscall(SYS_pivot_root, ".", ".") == 0 && umount2(".", MNT_DETACH) == 0, "pivot_root");

	check(unshare(CLONE_NEWUSER) == 0 && write(c->status[1], "u", 1) == 1 && read(c->go[0], &byte, 1) == 1, "user namespace");
	check(setresgid(0, 0, 0) == 0 && setresuid(0, 0, 0) == 0, "setresuid");
	check(unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS) == 0, "net, ipc, uts");
	check(sethostname(c->name, strlen(c->name)) == 0, "sethostname");
	lo_up();
	setsid();
	dup2(null_fd, 0), dup2(null_fd, 1);
	for (int capability = 0; prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
		if (!(kept >> capability & 1))
			check(prctl(PR_CAPBSET_DROP, capability) == 0, "bounding set");
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2] = {{kept, kept, 0}, {0, 0, 0}};
	check(syscall(SYS_capset, &header, data) == 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "capset");
	execl(program, program, NULL);
	check(0, "execve %s", program);
}

/* ---- per container, in the parent ---- */

static void map_ids(int pid)
{
	char path[64];
	const char *map = rootless ? "0 0 1" : "0 1000000 65536";
	snprintf(path, sizeof path, "/proc/%d", pid);
	int process = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (rootless)
		put(process, "setgroups", "deny");
	put(process, "uid_map", map);
	put(process, "gid_map", map);
	close(process);
}

static void start(struct container *c, int number, const char *program)
{
	snprintf(c->name, sizeof c->name, "c%d-%d", getpid(), number);
	c->v2 = -1;
	for (int i = 0; i < group_count; i++) {
		c->tasks[i] = -1;
		check(mkdirat(groups[i].base, c->name, 0755) == 0, "mkdir cgroup");
		int made = openat(groups[i].base, c->name, O_PATH | O_DIRECTORY | O_CLOEXEC);
		if (groups[i].file)
			put(made, groups[i].file, groups[i].limit);
		if (groups[i].v2)
			c->v2 = made;
		else {
			c->tasks[i] = openat(made, "tasks", O_WRONLY | O_CLOEXEC);
			close(made);
		}
	}
	check(mkdirat(sandboxes, c->name, 0755) == 0, "mkdir sandbox");
	c->sandbox = syscall(SYS_open_tree, sandboxes, c->name, 1 /* OPEN_TREE_CLONE */ | O_CLOEXEC);
	check(c->sandbox >= 0 && pipe2(c->status, O_CLOEXEC) == 0 && pipe2(c->go, O_CLOEXEC) == 0, "open_tree, pipe2");
	struct clone_args args = {
		.flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_PIDFD | CLONE_CLEAR_SIGHAND | (c->v2 >= 0 ? CLONE_INTO_CGROUP : 0),
		.pidfd = (uintptr_t)&c->pidfd, .exit_signal = SIGCHLD, .cgroup = c->v2 >= 0 ? c->v2 : 0};
	c->pid = syscall(SYS_clone3, &args, sizeof args);
	check(c->pid >= 0, "clone3");
	if (c->pid == 0)
		become(c, program);
	close(c->status[1]), close(c->go[0]), close(c->sandbox);
	for (int i = 0; i < group_count; i++)
		if (c->tasks[i] >= 0)
			close(c->tasks[i]);
	if (c->v2 >= 0)
		close(c->v2);
}

static void map(struct container *c)
{
	char byte;
	check(read(c->status[0], &byte, 1) == 1, "the child died before its user namespace");
	map_ids(c->pid);
	check(write(c->go[1], "g", 1) == 1, "go");
	close(c->status[0]), close(c->go[1]);
}

static void finish(struct container *c)
{
	siginfo_t info;
	check(waitid(P_PIDFD, c->pidfd, &info, WEXITED) == 0, "waitid");
	check(info.si_code == CLD_EXITED && info.si_status == 0, "the program did not exit with 0");
	close(c->pidfd);
	for (int i = 0; i < group_count; i++)
		check(unlinkat(groups[i].base, c->name, AT_REMOVEDIR) == 0, "rmdir cgroup");
	check(unlinkat(sandboxes, c->name, AT_REMOVEDIR) == 0, "rmdir sandbox");
}

static void launch(int at_once, const char *program)
{
	static struct container all[MAX_AT_ONCE];
	static int number;
	for (int i = 0; i < at_once; i++)
		start(&all[i], number++, program);
	for (int i = 0; i < at_once; i++)
		map(&all[i]);
	for (int i = 0; i < at_once; i++)
		finish(&all[i]);
}

static void become_root_of_a_user_namespace(void)
{
	char map[64];
	int uid = geteuid(), gid = getegid(), self;
	rootless = 1;
	check(unshare(CLONE_NEWUSER) == 0, "unshare(NEWUSER)");
	self = open("/proc/self", O_PATH | O_DIRECTORY | O_CLOEXEC);
	put(self, "setgroups", "deny");
	snprintf(map, sizeof map, "0 %d 1", uid);
	put(self, "uid_map", map);
	snprintf(map, sizeof map, "0 %d 1", gid);
	put(self, "gid_map", map);
	close(self);
}

static void remove_groups(int base) /* what a launch that failed has left in it, and itself */
{
	char self[64], path[4096];
	struct dirent *entry;
	snprintf(self, sizeof self, "/proc/self/fd/%d", base);
	ssize_t length = readlink(self, path, sizeof path - 1);
	path[length > 0 ? length : 0] = 0;
	DIR *listing = opendir(path);
	while (listing && (entry = readdir(listing)))
		if (entry->d_type == DT_DIR && entry->d_name[0] != '.')
			unlinkat(dirfd(listing), entry->d_name, AT_REMOVEDIR);
	if (listing)
		closedir(listing);
	check(rmdir(path) == 0, "rmdir %s", path);
}

int main(int argc, char **argv)
{
	char line[64], where[] = "/tmp/meso-floor-XXXXXX";
	const char *program = argc > 1 ? argv[1] : "/usr/bin/true";
	int many, processes;
	snprintf(run_name, sizeof run_name, "mesofloor-%d", getpid());
	signal(SIGPIPE, SIG_IGN);
	find_groups();
	check(mkdtemp(where) != NULL, "mkdtemp");
	char *place = strdup(where);
	int outside = open("/tmp", O_PATH | O_DIRECTORY | O_CLOEXEC);
	null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	pid_t worker = fork(); /* so that somebody outside the womb can take the cgroups and the directory away */
	if (worker) {
		int status;
		waitpid(worker, &status, 0);
		for (int i = 0; i < group_count; i++)
			remove_groups(groups[i].base);
		check(unlinkat(outside, place + strlen("/tmp/"), AT_REMOVEDIR) == 0, "rmdir %s", place);
		return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (geteuid())
		become_root_of_a_user_namespace();
	check(unshare(CLONE_NEWNS) == 0, "unshare(NEWNS)");
	build_womb(where);
	check(mkdir("/sandboxes", 0755) == 0, "mkdir /sandboxes");
	check((sandboxes = open("/sandboxes", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) >= 0, "open /sandboxes");
	printf("{\"cgroups\": %d, \"rootless\": %d}\n", group_count, rootless);
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		double began = now_us();
		if (sscanf(line, "x %d %d", &many, &processes) == 2) {
			for (int p = 0; p < processes; p++)
				if (fork() == 0) {
					for (int i = p; i < many; i += processes)
						launch(1, program);
					_exit(0);
				}
			for (int p = 0, status; p < processes; p++)
				check(wait(&status) > 0 && status == 0, "a launching process failed");
		} else {
			many = atoi(line);
			check(many > 0 && many <= MAX_AT_ONCE, "not a number of containers: %s", line);
			launch(many, program);
		}
		printf("{\"us\": %.1f}\n", now_us() - began);
		fflush(stdout);
	}
	return 0;
}
