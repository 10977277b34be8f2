/*
 * What the torture guest does not do in Rust: an access that may fault, by the kernel or by user code, and what it comes back by.
 *
 * An access ends in one of three ways, each at torture_end: by int 0x80, by an exception, or by the hypervisor, which goes on at r15
 * where there is no memory (it clears r14 then).
 */
.text

/* torture_probe(access = rdi, address = rsi, value = rdx, user's stack or 0 = rcx, goes on at = r8) -> rax: value, rdx: 0 if nothing is there */
.global torture_probe
torture_probe:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rip + torture_stack], rsp
    mov qword ptr [rip + torture_error], -1
    movabs r14, 0x6e6f7468696e6721
    mov r15, r8
    test rcx, rcx
    jnz 2f
    jmp rdi
2:
    push 0x1b                       /* SS, RSP, RFLAGS, CS, RIP of user code */
    push rcx
    push 2
    push 0x23
    push rdi
    iretq

.global torture_read
torture_read:
    mov rax, [rsi]
    int 0x80
.global torture_write
torture_write:
    mov [rsi], rdx
    int 0x80
.global torture_fetch
torture_fetch:
    call rsi
.global torture_after
torture_after:
    int 0x80

/* The gates: all on a stack of their own, all for good. */
.global torture_page_fault
torture_page_fault:
    mov rax, cr2
    mov [rip + torture_address], rax
    pop qword ptr [rip + torture_error]
    jmp torture_end
.global torture_exception
torture_exception:
    mov qword ptr [rip + torture_error], 0x10000
.global torture_end
torture_end:
    mov rsp, [rip + torture_stack]
    mov rdx, r14
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

.section .data.torture, "aw"
.balign 8
torture_stack:
    .quad 0
.global torture_error
torture_error:
    .quad 0
.global torture_address
torture_address:
    .quad 0
.text
