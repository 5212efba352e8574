//! The in-process network of vmring.
