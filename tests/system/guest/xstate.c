/* Preloaded into the guest's kernel on machines with AMX.
 *
 * User Mode Linux 6.1 keeps 2696 bytes of extended register state per thread: all of it, up to AVX-512 and protection
 * keys. With AMX the state is 11 KiB. PTRACE_GETREGSET then answers with the first part, which is fine; but
 * PTRACE_SETREGSET takes the whole or nothing (EFAULT), and the guest's first process dies with "ptrace set fp regs
 * failed, errno = 14". So the whole is read, the part that UML knows is laid over it, and the whole is written.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
	static long (*next)(enum __ptrace_request, pid_t, void *, void *);
	static char whole[65536]; /* the guest has one CPU, so one thread at a time is here */
	__builtin_va_list list;
	__builtin_va_start(list, request);
	pid_t pid = __builtin_va_arg(list, pid_t);
	void *address = __builtin_va_arg(list, void *), *data = __builtin_va_arg(list, void *);
	__builtin_va_end(list);

	if (!next)
		next = dlsym(RTLD_NEXT, "ptrace");
	if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE) {
		const struct iovec *part = data;
		struct iovec all = {whole, sizeof whole};
		if (next(PTRACE_GETREGSET, pid, address, &all) == 0 && part->iov_len < all.iov_len) {
			memcpy(whole, part->iov_base, part->iov_len);
			return next(request, pid, address, &all);
		}
	}
	return next(request, pid, address, data);
}
