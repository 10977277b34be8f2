/*
 * The first instructions. QEMU starts an ELF file that has a note of type 18 by the PVH protocol: 32-bit protected mode, no paging,
 * flat segments, EBX pointing to the start information. From here to Rust: identity page tables for the first 512 GiB, long mode,
 * SSE (the precompiled core library uses it), a stack.
 */

.section .note.Xen, "a", @note
.balign 4
.long 4, 8, 18
.asciz "Xen"
.quad start32

.section .text.start, "ax"
.code32
.global start32
start32:
    cli
    cld
    mov esp, offset boot_stack_end
    mov esi, ebx
    call enter_long_mode_tables
    lgdt [boot_gdt_pointer]
    ljmp 0x08, offset start64

/* Everything that a processor needs before the far jump into 64-bit code; uses eax, ecx, edx. */
enter_long_mode_tables:
    mov eax, cr4
    or eax, 0x620                   /* PAE, OSFXSR, OSXMMEXCPT */
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x900                   /* LME, NXE: nested tables use no-execute by the host's setting */
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffffb             /* no EM; caches on: after INIT they are off */
    or eax, 0x80010022              /* PG, WP, NE, MP */
    mov cr0, eax
    ret

.code64
start64:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    lea rsp, [rip + boot_stack_end]
    mov edi, esi
    call hypervisor_main
    ud2

/*
 * Where another processor starts: copied to a page below 1 MiB (0x8000), entered in real mode. The mailbox behind the code has its
 * stack and what it calls.
 */
.global ap_trampoline
.global ap_trampoline_end
.global ap_stack
.global ap_entry
.balign 16
.code16
ap_trampoline:
    cli
    cld
    xor ax, ax
    mov ds, ax
    lgdt [ap_gdt_at]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    ljmp 0x18, offset ap_start32_at
.code32
ap_start32:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, offset ap_start_stack_end
    mov eax, offset enter_long_mode_tables
    call eax
    ljmp 0x08, offset ap_start64
.balign 8
ap_gdt_pointer:
    .word 31
    .long boot_gdt
ap_trampoline_end:
.set ap_gdt_at, 0x8000 + (ap_gdt_pointer - ap_trampoline)
.set ap_start32_at, 0x8000 + (ap_start32 - ap_trampoline)
.code64
ap_start64:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov rsp, [rip + ap_stack]
    call [rip + ap_entry]
    ud2

.section .data.boot, "aw"
.balign 4096
boot_pml4:
    .quad boot_pdpt + 3
    .fill 511, 8, 0
boot_pdpt:
    .set address, 0
    .rept 512
    .quad address + 0x83
    .set address, address + 0x40000000
    .endr

.balign 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff        /* 0x08: 64-bit code */
    .quad 0x00cf93000000ffff        /* 0x10: data */
    .quad 0x00cf9b000000ffff        /* 0x18: 32-bit code */
boot_gdt_pointer:
    .word 31
    .long boot_gdt
    .long 0
.balign 8
ap_stack:
    .quad 0
ap_entry:
    .quad 0

.section .bss.stack, "aw", @nobits
.balign 4096
    .skip 0x1000
ap_start_stack_end:
    .skip 0x80000
boot_stack_end:
