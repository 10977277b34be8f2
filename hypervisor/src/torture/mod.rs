//! The torture guest: it edits its own page tables in the orders that have broken shadow paging before, and looks what it sees.
//!
//! It is no Linux but a part of this program: the hypervisor copies its own image into the guest's memory, where it lies at the same
//! addresses, and starts it at [`guest::start`]. The guest runs one [step](STEPS) after another. Each is named after what went wrong once, and
//! has a verdict of its own. Under nested paging the processor itself walks the guest's tables, so a run with nested paging
//! says whether the steps expect the right thing; a run with shadow paging says whether shadow paging does it.
//!
//! ```text
//!  guest physical                                       guest virtual
//!  0        image, tables (from 8 MiB), stacks          0        the same, for the kernel (pages of 2 MiB)
//!  32 MiB   DATA: RAM                                   512 GiB  the first 16 MiB for user code
//!  64 MiB   PLACE: slots of the steps                   1 TiB    AREA: whatever a step maps
//!  256 MiB  HOLE: never anything                        1.5 TiB  OTHER: the same
//! ```
//!
//! The host's half is [`crate::scenario::torture`].

pub(crate) mod guest;
mod rows;
mod rules;

pub(crate) use self::guest::{Failure, Machine};

/// A step.
pub(crate) struct Step {
    pub(crate) name: &'static str,
    /// What went wrong once, or what the rule is.
    pub(crate) what: &'static str,
    run: fn(&mut Machine) -> Result<(), Failure>,
}

macro_rules! steps {
    ($($module:ident::$name:ident: $what:literal,)*) => {
        /// In the order in which they run.
        pub(crate) static STEPS: &[Step] =
            &[$(Step { name: stringify!($name), what: $what, run: $module::$name }),*];
    };
}

steps! {
    rules::error_codes: "a fault has the error code and the address that the manual gives it",
    rules::accessed_and_dirty: "accesses set A in every level and D where it was a write, and only then",
    rules::write_protect_off: "with CR0.WP off the kernel writes to what is read-only, users do not",
    rules::execution_and_access_prevention: "SMEP and SMAP keep the kernel out of user pages",
    rules::no_execute: "EFER.NXE gives bit 63 its meaning",
    rules::flushes: "a change is seen after INVLPG, a CR3 load or a toggle of CR4.PGE, and an entry that was not present at once",
    rules::tables_shared_by_roots: "roots that have tables in common see each other's changes",
    rules::recursive: "a root is a table of each level at once",
    rules::many_tables_at_once: "a hundred tables are edited before the next flush",
    rows::large_page_moves: "row 29 (CVE-2026-46113): a large page points elsewhere, behind our back; its slot goes",
    rows::large_page_becomes_table: "row 30 (CVE-2026-53359): the first page of a large page is a table, too",
    rows::memory_becomes_hole: "row 31 (CVE-2026-23401): what was memory is a hole, behind our back",
    rows::large_page_below_a_slot: "row 32: a large page begins below its slot; the dirty log comes and goes",
    rows::slots_with_odd_ends: "row 33 (CVE-2024-26991): pieces of a large page change their slots' flags",
    rows::one_table_two_permissions: "row 34 (CVE-2021-38198): one table on paths with different permissions",
    rows::more_tables_than_the_limit: "row 35 (CVE-2022-45869): more tables are used than there may be",
    rows::zap_in_steps: "row 36 (CVE-2021-47094): frames move while ranges are zapped bit by bit",
    rows::table_edited_while_unlinked: "row 37: a table changes while it is linked nowhere",
    rows::table_moves: "row 38 (CVE-2022-1158): A and D bits go to the frame that the table has now",
    rows::device_goes: "row 39 (CVE-2021-22543): the device behind a mapping is gone",
    rows::two_address_spaces: "row 40: what is memory, and a table, depends on the address space",
    rows::logged_page_becomes_table: "row 41: a page that is write-protected for the dirty log becomes a table",
}

/// The guest calls with one of these in RAX; arguments are in RBX, RCX, RDX, RSI, the answer is in RAX.
pub(crate) mod call {
    /// A step begins: its number.
    pub(crate) const BEGIN: u64 = 0x746f_7200;
    /// It ends: its number, the line of an expectation that failed or 0, what was seen there, what should have been.
    pub(crate) const END: u64 = 0x746f_7201;
    /// There are no more.
    pub(crate) const DONE: u64 = 0x746f_7202;
    /// A device writes: an address, a value. Nobody is told.
    pub(crate) const WRITE: u64 = 0x746f_7203;
    /// A device reads.
    pub(crate) const READ: u64 = 0x746f_7204;
    /// Whoever follows the guest's tables is told that something was written: an address, bytes.
    pub(crate) const TELL: u64 = 0x746f_7205;
    /// A slot of RAM appears: its id, first frame, pages, the pool's page behind the first one.
    pub(crate) const CREATE: u64 = 0x746f_7206;
    /// A slot of a device appears: its id and its frame.
    pub(crate) const DEVICE: u64 = 0x746f_7207;
    /// What the device has.
    pub(crate) const LOOK: u64 = 0x746f_7208;
    /// A slot goes: its id.
    pub(crate) const DELETE: u64 = 0x746f_7209;
    /// A slot gets other flags: its id, and KVM's flags.
    pub(crate) const FLAGS: u64 = 0x746f_720a;
    /// A slot is cut: its id, a frame, the id of what begins there.
    pub(crate) const SPLIT: u64 = 0x746f_720b;
    /// Two slots become one: the lower one's id, the upper one's.
    pub(crate) const MERGE: u64 = 0x746f_720c;
    /// Other frames are put behind pages of one slot, and the old ones filled with something else: an address, how many.
    pub(crate) const MOVE: u64 = 0x746f_720d;
    /// Frames are zapped: the first one, how many, how many entries at a time.
    pub(crate) const ZAP: u64 = 0x746f_720e;
    /// Whether the dirty log has a frame. What it had is forgotten.
    pub(crate) const DIRTY: u64 = 0x746f_720f;
    /// All invariants are checked; if it has the argument 1, without looking at the guest's tables.
    pub(crate) const CHECK: u64 = 0x746f_7210;
    /// The processor enters an address space: its number.
    pub(crate) const SPACE: u64 = 0x746f_7211;
}

/// In R14: where there is no memory, the guest goes on at R15, with R14 cleared.
pub(crate) const EXPECTS_NOTHING: u64 = 0x6e6f_7468_696e_6721;

/// The end of low memory: image, tables, stacks.
pub(crate) const HOME: u64 = 16 << 20;
/// The root table; behind it the others.
pub(crate) const ROOT: u64 = 8 << 20;
/// Tables that the host makes for the guest: the root, and two of each lower level down to pages of 2 MiB.
pub(crate) const TABLES: u64 = ROOT + 5 * 4096;
/// Where the tables of steps end.
const TABLES_END: u64 = 14 << 20;
/// The end of the stack of user code, below it the one of exceptions and the kernel's.
const USER_STACK: u64 = 15 << 20;
pub(crate) const EXCEPTION_STACK: u64 = USER_STACK + (64 << 10);
pub(crate) const STACK: u64 = HOME;
/// Descriptors and gates, below the image.
pub(crate) const SEGMENTS: u64 = 0x1000;
pub(crate) const GATES: u64 = 0x2000;
pub(crate) const TASK: u64 = 0x3000;
/// Where user code sees low memory.
pub(crate) const USER: u64 = 1 << 39;
pub(crate) const DATA: u64 = 32 << 20;
pub(crate) const DATA_END: u64 = 48 << 20;
const PLACE: u64 = 64 << 20;
const HOLE: u64 = 256 << 20;
const AREA: u64 = 2 << 39;
const OTHER: u64 = 3 << 39;
