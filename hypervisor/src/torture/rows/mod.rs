//! Steps after bugs of the past, in the order of the list of KVM's that this project keeps: each edits tables, and has the host change
//! slots and frames, in the order that went wrong there.
//!
//! *Behind our back* means: an entry is written by a device, so that nobody is told. Until somebody is, the old translation
//! or the new one may be seen, so nothing is expected of values then; but whatever is mapped meanwhile must be
//! filed where it is found again.

mod pages;
mod tables;

use super::guest::{
    ACCESSED, ALL, BY_FETCH, BY_USER, BY_WRITE, DIRTY, EFER_NO_EXECUTE, Failure, LARGE, Machine, NO_EXECUTE,
    Outcome, PRESENT, REFUSED, USERS, WRITE, Who, host, must,
};
use super::{AREA, DATA, HOLE, OTHER, PLACE, call};
use crate::cpu::index;
use Outcome::{Done, Fault, Nothing};
use Who::{Kernel, User};

pub(super) use self::pages::{
    large_page_becomes_table, large_page_below_a_slot, large_page_moves, memory_becomes_hole,
    slots_with_odd_ends,
};
pub(super) use self::tables::{
    device_goes, logged_page_becomes_table, more_tables_than_the_limit, one_table_two_permissions,
    table_edited_while_unlinked, table_moves, two_address_spaces, zap_in_steps,
};

type Verdict = Result<(), Failure>;

const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;

/// The slot of a step, and the page of the pool behind its first frame.
const ID: u64 = 10;
const POOL: u64 = 0x3000;
/// KVM's flags of slots.
const LOG: u64 = 1;
const READ_ONLY: u64 = 2;

fn create(gpa: u64, bytes: u64) {
    host(call::CREATE, [ID, gpa >> 12, bytes >> 12, POOL]);
}

/// The same for 2 MiB whose frames are contiguous, and not aligned as the guest's: what maps a large page of the guest there is made of
/// small ones.
fn create_in_pieces(id: u64, gpa: u64) {
    host(call::CREATE, [id, gpa >> 12, 512, POOL + 1 + 1024 * (id - ID)]);
}

/// Another frame is put behind each of these pages at once.
fn move_pages(gpa: u64, pages: u64) {
    host(call::MOVE, [gpa, pages, 0, 0]);
}

fn delete(id: u64) {
    host(call::DELETE, [id, 0, 0, 0]);
}

fn set_flags(id: u64, flags: u64) {
    host(call::FLAGS, [id, flags, 0, 0]);
}

fn check() {
    host(call::CHECK, [0; 4]);
}

/// The same while an entry has been written behind our back.
fn check_maps() {
    host(call::CHECK, [1, 0, 0, 0]);
}

fn is_dirty(gpa: u64) -> u64 {
    host(call::DIRTY, [gpa >> 12, 0, 0, 0])
}

/// A device writes an entry.
fn behind_our_back(entry: u64, value: u64) {
    host(call::WRITE, [entry, value, 0, 0]);
}

/// Now it is told.
fn tell(entry: u64) {
    host(call::TELL, [entry, 8, 0, 0]);
}
