//! DNS: the resolvers of the host.

pub mod resolvers;
