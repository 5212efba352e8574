//! vmring
