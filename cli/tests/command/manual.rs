//! The manual pages, and what is installed with them.

use super::*;

/// The commands that the help lists.
fn commands() -> Vec<String> {
    let help = vmring(&["--help"]);
    let help = text(&help.stdout);
    let (_, rest) = help.split_once("Commands:\n").expect("a list of commands");
    let lines = rest.lines().take_while(|line| !line.is_empty());
    let first = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    first.map(|line| line.split_whitespace().next().expect("a name").to_owned()).collect()
}

/// A page without the marks of roff.
fn words(page: &str) -> String {
    page.replace("\\-", "-").replace("\\fB", "").replace("\\fI", "").replace("\\fR", "")
}

/// Goal: each command has a page of its name, with each option of its help and its notes. The page is the
/// same every time.
#[test]
fn each_command_has_a_page_with_its_options() {
    let mut seen = 0;
    for command in commands() {
        let output = vmring(&["man", &command]);
        assert_eq!(output.status.code(), Some(0), "{command}: {}", text(&output.stderr));
        let page = words(text(&output.stdout));
        assert!(page.contains(&format!("vmring-{command} - ")), "{command}: {page}");
        let help = vmring(&[&command, "--help"]);
        let options = text(&help.stdout).split_whitespace().filter(|word| word.starts_with("--"));
        for option in options {
            let name: String =
                option.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
            assert!(
                page.contains(name.trim_end_matches('-')),
                "{command}: {option} is not in: {page}"
            );
            seen += 1;
        }
        assert_eq!(vmring(&["man", &command]).stdout, output.stdout);
    }
    assert!(seen > 100, "{seen}");
    let page = words(text(&vmring(&["man"]).stdout));
    for command in commands() {
        assert!(page.contains(&format!("vmring-{command}(1)")), "{command} is not in: {page}");
    }
    let refused = refused(&["man", "frob"]);
    assert!(refused.contains("there is no command 'frob'"), "{refused}");
}

/// Goal: one command installs every page and the completions, and says where. Installed again, nothing
/// changes. A formatter has nothing to say about the pages.
#[test]
fn the_pages_and_the_completions_are_installed_by_one_command() {
    let folder = scratch("manual");
    let prefix = folder.join("usr");
    let install = ["man", "--install", prefix.to_str().expect("a path of text")];
    let output = vmring(&install);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let files: Vec<PathBuf> = text(&output.stdout).lines().map(PathBuf::from).collect();
    assert_eq!(files.len(), 1 + commands().len() + 3);
    let pages = prefix.join("share/man/man1");
    assert!(pages.join("vmring.1").exists());
    for command in commands() {
        assert!(pages.join(format!("vmring-{command}.1")).exists(), "{command}");
    }
    for (shell, path) in [
        ("bash", "share/bash-completion/completions/vmring"),
        ("zsh", "share/zsh/site-functions/_vmring"),
        ("fish", "share/fish/vendor_completions.d/vmring.fish"),
    ] {
        let script = std::fs::read(prefix.join(path)).expect(path);
        assert_eq!(script, vmring(&["completions", shell]).stdout);
    }
    assert_eq!(vmring(&install).stdout, output.stdout);
    for page in files.iter().filter(|file| file.extension().is_some_and(|kind| kind == "1")) {
        let groff = Command::new("groff").args(["-man", "-Tutf8", "-ww", "-z"]).arg(page).output();
        let Ok(groff) = groff else {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "skipped: the pages' form: there is no groff");
            break;
        };
        // A value or a path that is longer than a line is no fault of the page.
        let said = text(&groff.stderr).lines().filter(|line| !line.contains("cannot"));
        let said: Vec<_> = said.collect();
        assert!(groff.status.success() && said.is_empty(), "{}: {said:?}", page.display());
    }
    let file = folder.join("file");
    std::fs::write(&file, "").expect("a file");
    let output = vmring(&["man", "--install", file.to_str().expect("a path of text")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot be written"), "{}", text(&output.stderr));
}
