/*
 * svm_run(vmcb = rdi, registers = rsi)
 *
 * VMRUN switches rax, rsp, rip, flags, control registers and visible segments. The rest is done here.
 */
.section .text.svm_run, "ax"
.global svm_run
svm_run:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rsi

    ldmxcsr [rsi + 112]
    .irp register, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movaps xmm\register, [rsi + 128 + 16 * \register]
    .endr

    mov rax, rdi
    mov rbx, [rsi]
    mov rcx, [rsi + 8]
    mov rdx, [rsi + 16]
    mov rdi, [rsi + 32]
    mov rbp, [rsi + 40]
    mov r8, [rsi + 48]
    mov r9, [rsi + 56]
    mov r10, [rsi + 64]
    mov r11, [rsi + 72]
    mov r12, [rsi + 80]
    mov r13, [rsi + 88]
    mov r14, [rsi + 96]
    mov r15, [rsi + 104]
    mov rsi, [rsi + 24]

    vmrun rax

    pop rax                         /* the registers */
    mov [rax], rbx
    mov [rax + 8], rcx
    mov [rax + 16], rdx
    mov [rax + 24], rsi
    mov [rax + 32], rdi
    mov [rax + 40], rbp
    mov [rax + 48], r8
    mov [rax + 56], r9
    mov [rax + 64], r10
    mov [rax + 72], r11
    mov [rax + 80], r12
    mov [rax + 88], r13
    mov [rax + 96], r14
    mov [rax + 104], r15
    .irp register, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movaps [rax + 128 + 16 * \register], xmm\register
    .endr
    stmxcsr [rax + 112]

    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
