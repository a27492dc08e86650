use clap::{CommandFactory as _, Parser as _, error::ErrorKind};

use super::Cli;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_explains_itself_with_examples() {
    fn check(command: &clap::Command, path: &str) {
        let path = format!("{path} {}", command.get_name());
        assert!(command.get_about().is_some(), "{path} says nothing about itself");
        let leaf = command.get_subcommands().filter(|sub| sub.get_name() != "help").count() == 0;
        if leaf {
            let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(examples.starts_with("Examples:\n  retort "), "{path} shows no examples");
        }
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            check(sub, &path);
        }
    }
    check(&Cli::command(), "");
}

#[test]
fn the_lines_of_the_examples_parse() {
    for line in [
        "retort up",
        "retort up --home /h --listen 127.0.0.1:0 --broker-listen 127.0.0.1:0 --teachers 2 --students 0 --json",
        "retort up --no-broker --brokers kafka:9092",
        "retort up --device cuda:1 --dtype bf16",
        "retort plan --teacher llama-3.1-405b --nodes 2 --gpus 8 --gpu-memory 80GiB --dtype fp8 --fp8-layers all",
        "retort plan --teacher m --gpus 1 --tflops 70 --memory-bandwidth 900GB --mode score --tokens 1000 --json",
        "retort run job.yaml --plain --home /h --out o --new --keep-up",
        "retort run job.yaml --address http://h:1 --json",
        "retort job create job.yaml --validate-only --request-id 5f0c2ad4-30b4-4c0e-9d4e-8c4c1b1b0e7f",
        "retort job list --state running --limit 3 --json",
        "retort job delete x --yes",
        "retort --json job get x --address h:1",
        "retort model import m.gguf --out o",
        "retort model chat support@2 --prompt hi --temperature 0",
        "retort shard show f.parquet --rows 3",
        "retort shard stats a.parquet folder",
        "retort shard verify folder --json",
        "retort shard diff a.parquet b.parquet",
        "retort shard export folder --out all.jsonl",
        "retort completions zsh",
    ] {
        if let Err(error) = parse(line) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn wrong_lines_are_refused_with_a_hint() {
    for (line, kind, hint) in [
        ("retort rum job.yaml", ErrorKind::InvalidSubcommand, "'run'"),
        ("retort job lst", ErrorKind::InvalidSubcommand, "'list'"),
        ("retort run job.yaml --hom /h", ErrorKind::UnknownArgument, "'--home'"),
        ("retort up --no-broker", ErrorKind::MissingRequiredArgument, "--brokers"),
        ("retort up --brokers k:1", ErrorKind::MissingRequiredArgument, "--no-broker"),
        ("retort up --teachers 65", ErrorKind::ValueValidation, "0..=64"),
        ("retort up --device gpu", ErrorKind::ValueValidation, "say auto, cpu or cuda:0"),
        ("retort run job.yaml --device cuda:x", ErrorKind::ValueValidation, "say auto, cpu or cuda:0"),
        ("retort run job.yaml --dtype f16", ErrorKind::InvalidValue, "bf16"),
        ("retort run job.yaml --plain --json", ErrorKind::ArgumentConflict, "--json"),
        ("retort run job.yaml --keep-up --address a:1", ErrorKind::ArgumentConflict, "--address"),
        ("retort job list --state done", ErrorKind::InvalidValue, "succeeded"),
    ] {
        let error = parse(line).err().unwrap_or_else(|| panic!("{line} was taken"));
        assert_eq!(error.kind(), kind, "{line}: {error}");
        assert!(error.to_string().contains(hint), "{line}: {error}");
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}
