//! TCP by scripts: one for each way in which a translator is known to go wrong.

mod closing;
mod handshake;
mod offload;
mod receiving;
mod sending;
