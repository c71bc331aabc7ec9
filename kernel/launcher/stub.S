# The walker of tables in machine code, x86-64. Its bytes are stub.x86_64.bin:
#
#     gcc -c -o stub.o stub.S && objcopy -O binary --only-section=.text stub.o stub.x86_64.bin
#
# A test assembles this file again and compares. What it must do is written in table.py (the format), in
# walk.py (walk_in_python, the same in Python) and, for the others, in cradle.py and keeper.py.
#
#     at 0:  long walk(row *rows, long count, long status)
#     at 8:  long cradle(row *rows, long count, control *c)
#     at 16: never keep(row *rows, long count, void *stack)
#
# System calls change rax, rcx and r11 only.

        .intel_syntax noprefix
        .text
        jmp     walk
        .balign 8
        jmp     cradle
        .balign 8
        jmp     keep
        .balign 8

# rbx the row, rbp its flags, r12 behind the last row, r13 the status descriptor, r14 the first row.
walk:
        push    rbx
        push    rbp
        push    r12
        push    r13
        push    r14
        mov     rbx, rdi
        mov     r14, rdi
        imul    rsi, rsi, 80
        lea     r12, [rdi + rsi]
        mov     r13, rdx

row:    cmp     rbx, r12
        jae     finished
        mov     rbp, [rbx + 72]
        mov     rdi, [rbx + 8]
        bt      ebp, 8
        jnc     1f
        mov     rdi, [rdi]
1:      mov     rsi, [rbx + 16]
        bt      ebp, 9
        jnc     2f
        mov     rsi, [rsi]
2:      mov     rdx, [rbx + 24]
        bt      ebp, 10
        jnc     3f
        mov     rdx, [rdx]
3:      mov     r10, [rbx + 32]
        bt      ebp, 11
        jnc     4f
        mov     r10, [r10]
4:      mov     r8, [rbx + 40]
        bt      ebp, 12
        jnc     5f
        mov     r8, [r8]
5:      mov     r9, [rbx + 48]
        bt      ebp, 13
        jnc     6f
        mov     r9, [r9]
6:      mov     rax, [rbx]
        syscall

        mov     rcx, [rbx + 56]
        test    rcx, rcx
        jz      7f
        mov     [rcx], rax
7:      test    bpl, 16                 # RETURN_IF_ANY: success or failure, the caller is told
        jz      8f
        test    rax, rax
        jnz     return
8:      mov     edx, ebp
        and     edx, 3
        cmp     edx, 2                  # OK_ANY
        je      good
        cmp     edx, 1                  # OK_EQUAL
        je      9f
        test    rax, rax
        js      bad
        jmp     good
9:      cmp     rax, [rbx + 64]
        jne     bad

good:   test    bpl, 32                 # LEAVE_IF_PARENT
        jz      10f
        test    rax, rax
        jg      leave_now
10:     test    bpl, 4                  # JUMP_IF_OK
        jnz     jump
        test    bpl, 64                 # JUMP_IF_ZERO
        jz      next
        test    rax, rax
        jz      jump
next:   add     rbx, 80
        jmp     row

bad:    test    bpl, 4
        jnz     next
        test    bpl, 8                  # JUMP_IF_FAIL
        jz      report
jump:   mov     rcx, rbp
        sar     rcx, 32
        inc     rcx
        imul    rcx, rcx, 80
        add     rbx, rcx
        jmp     row

report: mov     rcx, rax
        neg     ecx                     # the errno
        mov     rax, rbx
        sub     rax, r14
        xor     edx, edx
        mov     esi, 80
        div     rsi                     # the row's number
        push    0
        shl     rcx, 32
        mov     eax, eax
        or      rcx, rax
        push    rcx
        mov     eax, 1                  # write(status, record, 16)
        mov     rdi, r13
        mov     rsi, rsp
        mov     edx, 16
        syscall
        mov     edi, 126
        jmp     exit
leave_now:
        xor     edi, edi
exit:   mov     eax, 231                # exit_group
        syscall

finished:
        xor     eax, eax
return: pop     r14
        pop     r13
        pop     r12
        pop     rbp
        pop     rbx
        ret

# The launcher's copy that clones for it. The rows begin with the clone; in the launcher this returns what walk returns.
# In the cradle they go on to unmap nearly everything, this thread's old stack too, so all of it stands on another one.
# r15 the control block: 0 stack, 8 requests, 16 answers, 24 mould, 32 buffer, 40 own PID namespace;
# 48 size, 56 rows, 64 status, 72 whose PID namespace (the request); 80 the answer.
cradle: push    rbp
        push    r15
        mov     rbp, rsp
        mov     r15, rdx
        mov     rsp, [rdx]
        mov     rdx, -1
        call    walk
        test    rax, rax
        jz      answer                  # 0: it stands
        mov     rsp, rbp
        pop     r15
        pop     rbp
        ret

request:
        xor     eax, eax                # read(requests, request, 32)
        mov     edi, [r15 + 8]
        lea     rsi, [r15 + 48]
        mov     edx, 32
        syscall
        cmp     rax, 32
        jne     no_more
        mov     eax, 17                 # pread64(mould, buffer, size, 0)
        mov     edi, [r15 + 24]
        mov     rsi, [r15 + 32]
        mov     rdx, [r15 + 48]
        xor     r10d, r10d
        syscall
        cmp     rax, [r15 + 48]
        mov     ecx, -5                 # EIO
        cmovne  rax, rcx
        jne     answer
        mov     edi, [r15 + 72]
        call    enter
        test    rax, rax
        jnz     answer
        mov     rdi, [r15 + 32]
        add     rdi, 128
        mov     rsi, [r15 + 56]
        mov     rdx, [r15 + 64]
        call    walk
        mov     [r15 + 80], rax
        cmp     dword ptr [r15 + 72], 0
        js      say
        mov     edi, [r15 + 40]
        call    enter
        test    rax, rax
        jz      say
no_more:
        xor     edi, edi
        jmp     exit
answer: movsxd  rax, eax
        mov     [r15 + 80], rax
say:    mov     eax, 1                  # write(answers, answer, 8)
        mov     edi, [r15 + 16]
        lea     rsi, [r15 + 80]
        mov     edx, 8
        syscall
        jmp     request

enter:  xor     eax, eax                # setns(edi, CLONE_NEWPID), if there is one
        test    edi, edi
        js      1f
        mov     esi, 0x20000000
        mov     eax, 308
        syscall
1:      ret

# The keeper: its rows unmap nearly everything, then go round in a circle until there is nothing to wait for; they end with
# an exit_group of their own. See keeper.py.
keep:   mov     rsp, rdx
        mov     rdx, -1
        call    walk
        mov     edi, 126
        jmp     exit
