# The walker of tables in machine code, x86-64. Its bytes are stub.x86_64.bin:
#
#     gcc -c -o stub.o stub.S && objcopy -O binary --only-section=.text stub.o stub.x86_64.bin
#
# A test assembles this file again and compares. What it must do is written in table.py (the format) and in
# walk.py (walk_in_python, the same in Python).
#
#     long walk(row *rows, long count, long status)
#
# rbx the row, rbp its flags, r12 behind the last row, r13 the status descriptor, r14 the first row.
# System calls keep all of these (they change rax, rcx and r11 only).

        .intel_syntax noprefix
        .text
        .globl walk
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
