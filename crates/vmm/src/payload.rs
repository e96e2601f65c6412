//! The code that the guest runs, and the two pages through which each vCPU is told what to do and
//! tells what it saw.
//!
//! The code is independent of its position, uses neither stack nor SSE, and no instruction that
//! KVM's emulator does not know, so that it runs wherever KVM puts it: natively, or emulated an
//! instruction at a time (PVM in ring 0, or an access to memory that only user space has).
//! Interrupts stay off.

#[deny(unsafe_code)]
mod pages;

use std::arch::global_asm;

pub(crate) use self::pages::{Parameters, REPORT_WORDS, ReportPage};
use crate::pattern::{FACTOR, ROUND};

/// Port of progress: a vCPU has touched some more units.
pub(crate) const PORT_PROGRESS: u16 = 0x510;
/// Port of the end: a vCPU has done all.
pub(crate) const PORT_END: u16 = 0x514;
/// Port of exceptions: the report page says which.
pub(crate) const PORT_EXCEPTION: u16 = 0x518;

/// Vectors that the payload has handlers for: #UD, #DF, #GP, #PF and #MC.
pub(crate) const VECTORS: [u8; 5] = [6, 8, 13, 14, 18];

pub(crate) const OPERATION_READ: u64 = 0;
pub(crate) const OPERATION_WRITE: u64 = 1;
pub(crate) const OPERATION_MODIFY: u64 = 2;
pub(crate) const OPERATION_COUNT: u64 = 3;

pub(crate) const ORDER_SEQUENTIAL: u64 = 0;
pub(crate) const ORDER_RANDOM: u64 = 1;
pub(crate) const ORDER_TABLE: u64 = 2;

/// Buckets of the histogram of times: the n-th counts times with n significant bits.
pub(crate) const TIME_BUCKETS: usize = 65;

macro_rules! parameter {
    ($field:ident) => {
        std::mem::offset_of!(Parameters, $field)
    };
}
macro_rules! report {
    ($field:ident) => {
        std::mem::offset_of!(ReportPage, $field)
    };
}

// Registers: rbp parameters, r15 report, r14 touches of this round, r13 state of the permutation,
// r12 address of the unit, rbx offset in it, rsi address of the word, rax what it should be, rdx
// what it is, r8 what it may differ by, r9 distance of words, r10 FACTOR, r11 time before the
// touch; rcx and rdi are free.
global_asm!(
    ".pushsection .rodata.pageferry_vmm_payload, \"a\"",
    ".balign 16",
    // Rust code may be compiled into another object than this: its labels must be seen there.
    ".globl pageferry_vmm_payload, pageferry_vmm_handlers, pageferry_vmm_payload_end",
    ".hidden pageferry_vmm_payload, pageferry_vmm_handlers, pageferry_vmm_payload_end",
    "pageferry_vmm_payload:",
    ".macro PF_EXPECTED", // rsi -> rax
    "  mov rax, rsi",
    "  imul rax, r10",
    "  mov rcx, rsi",
    "  shr rcx, 12",
    "  xor rax, rcx",
    "  test rcx, [rbp + {zero_mask}]",
    "  jnz 77f",
    "  xor eax, eax",
    "77:",
    ".endm",
    // To the label with the next offset, or on behind the last one.
    ".macro PF_NEXT_WORD label",
    "  cmp rbx, [rbp + {last}]",
    "  je 78f",
    "  add rbx, r9",
    "  lea rcx, [rbx + 8]",
    "  cmp rcx, [rbp + {last}]",
    "  jbe \\label",
    "  mov rbx, [rbp + {last}]",
    "  jmp \\label",
    "78:",
    ".endm",
    // Entry: rdi is the address of the parameters.
    "  cld",
    "  mov rbp, rdi",
    "  mov r15, [rbp + {report_address}]",
    "  mov r10, [rip + 900f]",
    "  mov r9, [rbp + {stride}]",
    "  mov rax, [rbp + {rounds}]",
    "  mov [r15 + {rounds_left}], rax",
    "  mov rax, [rbp + {progress_every}]",
    "  mov [r15 + {until_progress}], rax",
    "  mov rax, -1",
    "  mov [r15 + {time_min}], rax",
    "  mov rax, [rip + 901f]",
    "  mov [r15 + {next_round_mask}], rax",
    "200:", // a round
    "  xor r14d, r14d",
    "  mov r13, [rbp + {permutation_start}]",
    "210:", // a unit: its number to rax
    "  mov rax, [rbp + {order}]",
    "  cmp rax, {order_random}",
    "  je 120f",
    "  cmp rax, {order_table}",
    "  je 130f",
    "  mov rax, r14",
    "  jmp 140f",
    "120:",
    "  imul r13, [rbp + {permutation_factor}]",
    "  add r13, [rbp + {permutation_addend}]",
    "  and r13, [rbp + {permutation_mask}]",
    "  mov rax, r13",
    "  mov rcx, [rbp + {permutation_shift}]",
    "  shr rax, cl",
    "  xor rax, r13",
    "  imul rax, [rbp + {permutation_mixer}]",
    "  and rax, [rbp + {permutation_mask}]",
    "  cmp rax, [rbp + {permutation_count}]",
    "  jae 120b",
    "  jmp 140f",
    "130:",
    "  mov rax, [rbp + {table}]",
    "  mov eax, dword ptr [rax + r14 * 4]",
    "140:",
    "  add rax, [rbp + {first}]",
    "  mov rcx, [rbp + {unit_shift}]",
    "  mov r12, rax",
    "  shl r12, cl",
    "  cmp rax, [rbp + {low_units}]",
    "  jae 141f",
    "  add r12, [rbp + {low_base}]",
    "  jmp 142f",
    "141:",
    "  add r12, [rbp + {high_base}]",
    "142:",
    // The first access, timed. A fault comes before the second reading; one that does not fault is
    // cheaper than what the counter resolves, so no fence.
    "  rdtsc",
    "  shl rdx, 32",
    "  or rdx, rax",
    "  mov r11, rdx",
    "  cmp qword ptr [rbp + {operation}], {operation_write}",
    "  je 150f",
    "  mov rdi, [r12]",
    "  jmp 151f",
    "150:",
    "  mov rsi, r12",
    "  PF_EXPECTED",
    "  xor rax, [rbp + {written}]",
    "  mov [r12], rax",
    "151:",
    "  rdtsc",
    "  shl rdx, 32",
    "  or rdx, rax",
    "  sub rdx, r11",
    "  jae 152f",
    "  xor edx, edx", // counters of two CPUs that differ
    "152:",
    "  add [r15 + {time_sum}], rdx",
    "  cmp rdx, [r15 + {time_min}]",
    "  jae 153f",
    "  mov [r15 + {time_min}], rdx",
    "153:",
    "  cmp rdx, [r15 + {time_max}]",
    "  jbe 154f",
    "  mov [r15 + {time_max}], rdx",
    "154:",
    "  xor ecx, ecx",
    "  test rdx, rdx",
    "  jz 155f",
    "  bsr rcx, rdx",
    "  inc rcx",
    "155:",
    "  add qword ptr [r15 + rcx * 8 + {histogram}], 1",
    // The words of the unit.
    "  xor ebx, ebx",
    "  xor r8d, r8d",
    "  mov rax, [rbp + {operation}]",
    "  cmp rax, {operation_write}",
    "  je 160f",
    "  cmp rax, {operation_modify}",
    "  je 180f",
    "  cmp rax, {operation_count}",
    "  je 185f",
    "  jmp 170f",
    "160:", // write
    "  lea rsi, [r12 + rbx]",
    "  PF_EXPECTED",
    "  xor rax, [rbp + {written}]",
    "  mov [rsi], rax",
    "  PF_NEXT_WORD 160b",
    "  xor ebx, ebx",
    "  mov r8, [rbp + {written}]",
    "170:", // read and compare
    "  lea rsi, [r12 + rbx]",
    "  PF_EXPECTED",
    "  xor rax, r8",
    "  mov rdx, [rsi]",
    "  cmp rax, rdx",
    "  je 171f",
    "  lea rdi, [rip + 171f]",
    "  jmp 300f",
    "171:",
    "  PF_NEXT_WORD 170b",
    "  jmp 190f",
    "180:", // read, compare, turn bits, write
    "  lea rsi, [r12 + rbx]",
    "  PF_EXPECTED",
    "  mov rdx, [rsi]",
    "  mov rcx, rdx",
    "  xor rcx, rax",
    "  jz 181f",
    "  cmp rcx, [rbp + {accepted}]",
    "  je 182f",
    "  lea rdi, [rip + 182f]",
    "  jmp 300f",
    "181:",
    "  xor rax, [rbp + {written}]",
    "  mov [rsi], rax",
    "182:",
    "  PF_NEXT_WORD 180b",
    "  jmp 190f",
    "185:", // read, compare with the last round's, write this round's
    "  lea rsi, [r12 + rbx]",
    "  PF_EXPECTED",
    "  xor rax, [r15 + {round_mask}]",
    "  mov rdx, [rsi]",
    "  cmp rax, rdx",
    "  je 186f",
    "  lea rdi, [rip + 186f]",
    "  jmp 300f",
    "186:",
    "  xor rax, [r15 + {round_mask}]",
    "  xor rax, [r15 + {next_round_mask}]",
    "  mov [rsi], rax",
    "  PF_NEXT_WORD 185b",
    "190:", // done with the unit
    "  add qword ptr [r15 + {touches_done}], 1",
    "  cmp qword ptr [rbp + {progress_every}], 0",
    "  je 191f",
    "  sub qword ptr [r15 + {until_progress}], 1",
    "  jnz 191f",
    "  mov rax, [rbp + {progress_every}]",
    "  mov [r15 + {until_progress}], rax",
    "  mov edx, {port_progress}",
    "  out dx, eax",
    "191:",
    "  inc r14",
    "  cmp r14, [rbp + {touches}]",
    "  jb 210b",
    "  mov rax, [r15 + {next_round_mask}]",
    "  mov [r15 + {round_mask}], rax",
    "  add rax, [rip + 901f]",
    "  mov [r15 + {next_round_mask}], rax",
    "  sub qword ptr [r15 + {rounds_left}], 1",
    "  jnz 200b",
    "  mov rsi, [rbp + {stray}]",
    "  test rsi, rsi",
    "  jz 192f",
    "  mov rdx, [rsi]",
    "192:",
    "  mov edx, {port_end}",
    "  out dx, eax",
    "  jmp 192b",
    // A mismatch: rsi where, rdx found, rax expected; rdi is where to go on.
    "300:",
    "  add qword ptr [r15 + {mismatches}], 1",
    "  cmp qword ptr [r15 + {mismatches}], 1",
    "  jne 301f",
    "  mov [r15 + {bad_address}], rsi",
    "  mov [r15 + {bad_found}], rdx",
    "  mov [r15 + {bad_expected}], rax",
    "301:",
    "  jmp rdi",
    ".balign 8",
    "900: .quad {factor}",
    "901: .quad {round}",
    // Handlers, 16 bytes apart, in the order of `VECTORS`; all in ring 0. Those of vectors for
    // which the processor pushes no error code push one.
    ".macro PF_HANDLER vector, has_code",
    ".balign 16",
    ".ifeq \\has_code",
    "  push 0",
    ".endif",
    "  push \\vector",
    "  jmp 500f",
    ".endm",
    ".balign 16",
    "pageferry_vmm_handlers:",
    "  PF_HANDLER 6, 0",
    "  PF_HANDLER 8, 1",
    "  PF_HANDLER 13, 1",
    "  PF_HANDLER 14, 1",
    "  PF_HANDLER 18, 0",
    "500:", // on the stack: vector, error code, instruction pointer
    "  mov r15, gs:[{report_address}]",
    "  mov rbx, [rsp]",
    "  mov [r15 + {vector}], rbx",
    "  mov rax, [rsp + 8]",
    "  mov [r15 + {error_code}], rax",
    "  mov rax, [rsp + 16]",
    "  mov [r15 + {instruction}], rax",
    "  mov rax, cr2",
    "  mov [r15 + {fault_address}], rax",
    "  cmp rbx, 18",
    "  jne 540f",
    // The banks of machine checks: IA32_MCG_CAP has their number, MCi_STATUS says which is valid.
    "  mov ecx, 0x179",
    "  rdmsr",
    "  movzx ebx, al",
    "  mov ecx, 0x401",
    "510:",
    "  test ebx, ebx",
    "  jz 530f",
    "  rdmsr",
    "  test edx, edx",
    "  js 520f",
    "  add ecx, 4",
    "  dec ebx",
    "  jmp 510b",
    "520:",
    "  shl rdx, 32",
    "  or rdx, rax",
    "  mov [r15 + {bank_status}], rdx",
    "  mov eax, ecx",
    "  sub eax, 0x401",
    "  shr eax, 2",
    "  mov [r15 + {bank}], rax",
    "  inc ecx", // MCi_ADDR
    "  rdmsr",
    "  shl rdx, 32",
    "  or rdx, rax",
    "  mov [r15 + {bank_address}], rdx",
    "  dec ecx", // a status is cleared by writing 0
    "  xor eax, eax",
    "  xor edx, edx",
    "  wrmsr",
    "530:",
    "  mov ecx, 0x17a", // IA32_MCG_STATUS: no machine check is in progress
    "  xor eax, eax",
    "  xor edx, edx",
    "  wrmsr",
    "540:",
    "  mov edx, {port_exception}",
    "  out dx, eax",
    "550:",
    "  hlt",
    "  jmp 550b",
    "pageferry_vmm_payload_end:",
    ".popsection",
    factor = const FACTOR,
    round = const ROUND,
    port_progress = const PORT_PROGRESS,
    port_end = const PORT_END,
    port_exception = const PORT_EXCEPTION,
    operation_write = const OPERATION_WRITE,
    operation_modify = const OPERATION_MODIFY,
    operation_count = const OPERATION_COUNT,
    order_random = const ORDER_RANDOM,
    order_table = const ORDER_TABLE,
    report_address = const parameter!(report_address),
    operation = const parameter!(operation),
    order = const parameter!(order),
    first = const parameter!(first),
    touches = const parameter!(touches),
    rounds = const parameter!(rounds),
    progress_every = const parameter!(progress_every),
    unit_shift = const parameter!(unit_shift),
    stride = const parameter!(stride),
    last = const parameter!(last),
    low_units = const parameter!(low_units),
    low_base = const parameter!(low_base),
    high_base = const parameter!(high_base),
    zero_mask = const parameter!(zero_mask),
    written = const parameter!(written),
    accepted = const parameter!(accepted),
    permutation_count = const parameter!(permutation_count),
    permutation_mask = const parameter!(permutation_mask),
    permutation_factor = const parameter!(permutation_factor),
    permutation_addend = const parameter!(permutation_addend),
    permutation_shift = const parameter!(permutation_shift),
    permutation_mixer = const parameter!(permutation_mixer),
    permutation_start = const parameter!(permutation_start),
    table = const parameter!(table),
    stray = const parameter!(stray),
    touches_done = const report!(touches),
    mismatches = const report!(mismatches),
    bad_address = const report!(bad_address),
    bad_found = const report!(bad_found),
    bad_expected = const report!(bad_expected),
    time_min = const report!(time_min),
    time_max = const report!(time_max),
    time_sum = const report!(time_sum),
    rounds_left = const report!(rounds_left),
    until_progress = const report!(until_progress),
    round_mask = const report!(round_mask),
    next_round_mask = const report!(next_round_mask),
    vector = const report!(vector),
    error_code = const report!(error_code),
    fault_address = const report!(fault_address),
    instruction = const report!(instruction),
    bank = const report!(bank),
    bank_status = const report!(bank_status),
    bank_address = const report!(bank_address),
    histogram = const size_of::<ReportPage>(),
);

unsafe extern "C" {
    static pageferry_vmm_payload: u8;
    static pageferry_vmm_handlers: u8;
    static pageferry_vmm_payload_end: u8;
}

/// The code: a vCPU starts at its first byte.
pub(crate) fn code() -> &'static [u8] {
    let (start, end) = (&raw const pageferry_vmm_payload, &raw const pageferry_vmm_payload_end);
    // SAFETY: both labels are in one read-only section of this file, the first before the second,
    // and everything between them was assembled above.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Where in the code the handler of the vector is that [`VECTORS`] has at `index`.
pub(crate) fn handler_offset(index: usize) -> usize {
    let (start, handlers) = (&raw const pageferry_vmm_payload, &raw const pageferry_vmm_handlers);
    handlers.addr() - start.addr() + 16 * index
}
