//! The `pageferry` command.
fn main() {}
