//! `--help`, rendered from argh's description of the commands. argh's own help omits the options of every command and has a
//! fixed width.

use argh::{ArgsInfo, CommandInfoWithArgs, FlagInfo, FlagInfoKind};

use super::args::Args;
use crate::sys::terminal::wrap;

/// Characters before the description of a command or an option.
const NAME_WIDTH: usize = 22;

/// Options of every command that are handled before argh.
const BUILT_IN: [(&str, &str); 2] = [("-h, --help", "print this help"), ("-V, --version", "print the version")];

/// Returns the help of the command with this name, or of the program.
pub fn text(command: Option<&str>, width: usize) -> String {
    let program = Args::get_args_info();
    let named = command.and_then(|name| program.commands.iter().find(|command| command.name == name));
    match named {
        Some(named) => command_help(named.name, &named.command, &program, width),
        None => program_help(&program, width),
    }
}

fn program_help(program: &CommandInfoWithArgs, width: usize) -> String {
    let mut text = "Usage: usepod-agent [OPTIONS] [COMMAND]\n\n".to_owned();
    text += &wrap("", program.description, width);
    text += "\nCommands:\n";
    for command in &program.commands {
        // The first sentence; the command's own help has the others.
        let summary = command.command.description.split(". ").next().unwrap_or_default().trim_end_matches('.');
        text += &entry(command.name, summary, width);
    }
    text += "\nOptions:\n";
    text += &global_options(program, width);
    for note in program.notes {
        text += &format!("\n{}", wrap("", note, width));
    }
    text += "\nExamples:\n";
    for example in program.examples {
        let (purpose, line) = example.split_once('\n').unwrap_or((example, ""));
        text += &wrap("  ", purpose, width);
        text += &format!("    {}\n", line.replace("{command_name}", "usepod-agent"));
    }
    text += "\nExit codes:\n";
    text += &wrap("  0  ", "success", width);
    for code in program.error_codes {
        text += &wrap(&format!("  {}  ", code.code), code.description, width);
    }
    text
}

fn command_help(name: &str, command: &CommandInfoWithArgs, program: &CommandInfoWithArgs, width: usize) -> String {
    let arguments: String = command.positionals.iter().map(|argument| format!(" <{}>", argument.name)).collect();
    let mut text = format!("Usage: usepod-agent {name}{arguments} [OPTIONS]\n\n");
    text += &wrap("", command.description, width);
    if !command.positionals.is_empty() {
        text += "\nArguments:\n";
    }
    for argument in command.positionals {
        text += &entry(&format!("<{}>", argument.name), argument.description, width);
    }
    // argh adds `--help` to the options of each command.
    let mut options = command.flags.iter().filter(|flag| flag.long != "--help").peekable();
    if options.peek().is_some() {
        text += "\nOptions:\n";
    }
    for option in options {
        text += &entry(&spelling(option), option.description, width);
    }
    text += "\nOptions of every command:\n";
    text + &global_options(program, width)
}

fn global_options(program: &CommandInfoWithArgs, width: usize) -> String {
    let own = program.flags.iter().filter(|flag| flag.long != "--help");
    let mut text: String = own.map(|option| entry(&spelling(option), option.description, width)).collect();
    for (names, description) in BUILT_IN {
        text += &entry(names, description, width);
    }
    text
}

fn spelling(option: &FlagInfo<'_>) -> String {
    let short = option.short.map_or_else(String::new, |short| format!("-{short}, "));
    match &option.kind {
        FlagInfoKind::Switch => format!("{short}{}", option.long),
        FlagInfoKind::Option { arg_name } => format!("{short}{} <{arg_name}>", option.long),
    }
}

fn entry(name: &str, description: &str, width: usize) -> String {
    wrap(&format!("  {name:NAME_WIDTH$}"), description, width)
}
