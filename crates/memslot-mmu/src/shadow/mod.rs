//! Shadow paging: the tables of a guest's own page tables.

pub mod guest;
