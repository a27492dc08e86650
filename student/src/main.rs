use std::process::ExitCode;

fn main() -> ExitCode {
    retort_student::cli::run()
}
