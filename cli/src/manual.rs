//! `vmring man`: manual pages, made of the command's own help, and their installation with the completions.

use std::fs;
use std::path::{Path, PathBuf};

use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::args::ManArgs;
use crate::failure::Failure;
use crate::report::print;

/// Where completions are installed, below the prefix.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "share/bash-completion/completions/vmring"),
    (Shell::Zsh, "share/zsh/site-functions/_vmring"),
    (Shell::Fish, "share/fish/vendor_completions.d/vmring.fish"),
];

/// `command` is the whole command line.
pub(crate) fn run(args: &ManArgs, mut command: clap::Command) -> Result<(), Failure> {
    command.build();
    if let Some(prefix) = &args.install {
        return install(prefix, &command);
    }
    let page = match &args.command {
        None => page(&command, None),
        Some(name) => {
            let found = command.get_subcommands().find(|one| one.get_name() == name);
            let wrong =
                || Failure::Usage(format!("there is no command '{name}'; see 'vmring --help'"));
            page(found.ok_or_else(wrong)?, Some(&command))
        }
    };
    print(&String::from_utf8_lossy(&page))
}

/// Writes every page and the completions below the prefix, and says where.
fn install(prefix: &Path, command: &clap::Command) -> Result<(), Failure> {
    let own = |one: &clap::Command, of: Option<&clap::Command>| {
        let name = one.get_display_name().unwrap_or_else(|| one.get_name());
        (prefix.join(format!("share/man/man1/{name}.1")), page(one, of))
    };
    let pages = command.get_subcommands().map(|one| own(one, Some(command)));
    let completions = COMPLETIONS.map(|(shell, path)| (prefix.join(path), script(shell, command)));
    let files = [own(command, None)].into_iter().chain(pages).chain(completions);
    let mut written = String::new();
    for (path, contents) in files {
        let failed = |error| {
            Failure::Step(format!("the file '{}' cannot be written: {error}", path.display()))
        };
        write(&path, &contents).map_err(failed)?;
        written.push_str(&format!("{}\n", path.display()));
    }
    print(&written)
}

fn write(path: &PathBuf, contents: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, contents)
}

/// A completion script.
pub(crate) fn script(shell: Shell, command: &clap::Command) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command.clone(), "vmring", &mut script);
    script
}

/// The page of a command, which is one of `vmring`'s, or `vmring` itself.
fn page(command: &clap::Command, of: Option<&clap::Command>) -> Vec<u8> {
    let version = concat!("vmring ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).source(version).manual("User Commands");
    let mut page = Vec::new();
    let mut render = |section: &dyn Fn(&Man, &mut Vec<u8>) -> std::io::Result<()>| {
        // Writing to memory does not fail.
        let _ = section(&man, &mut page);
    };
    render(&|man, to| man.render_title(to));
    render(&|man, to| man.render_name_section(to));
    render(&|man, to| man.render_synopsis_section(to));
    render(&|man, to| man.render_description_section(to));
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        render(&|man, to| man.render_options_section(to));
    }
    if command.has_subcommands() {
        render(&|man, to| man.render_subcommands_section(to));
    }
    let mut roff = Roff::default();
    if let Some(notes) = command.get_after_help() {
        roff.control("SH", ["NOTES"]);
        // Its lines are whole, and as wide as a terminal.
        roff.control("nf", []);
        roff.control("in", ["0"]);
        for line in notes.to_string().lines() {
            roff.text([roman(line)]);
        }
        roff.control("fi", []);
    }
    if let Some(of) = of {
        roff.control("SH", ["SEE ALSO"]);
        roff.text([bold(of.get_name().to_owned()), roman("(1)")]);
    }
    let _ = roff.to_writer(&mut page);
    page
}
