//! The vmring command.

fn main() {}
