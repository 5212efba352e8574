//! The crates block2, objc2 and dispatch2 ask the linker for libraries that only Apple's systems
//! have. This crate has the symbols, so empty archives satisfy the linker; an archive's header alone
//! is a valid one.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_CFG_TARGET_VENDOR").is_some_and(|vendor| vendor == "apple") {
        return Ok(());
    }
    let out = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let out = Path::new(&out);
    for library in ["BlocksRuntime", "dispatch", "objc"] {
        fs::write(out.join(format!("lib{library}.a")), b"!<arch>\n")?;
    }
    println!("cargo:rustc-link-search=native={}", out.display());
    Ok(())
}
