//! Pageferry.
