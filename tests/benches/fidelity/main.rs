//! What each way of storing soft targets costs, keeps, and does to a student: `docs/fidelity.md`.
//!
//! ```text
//! fidelity FOLDER                             everything; a second run goes on where the first stopped
//! fidelity FOLDER train STUDENT SETTING SEED  one training, as the first form starts them
//! fidelity FOLDER prune JSON [LEARNING_RATE]  what student.init.prune: JSON leaves, and after one pass
//! ```
//!
//! A teacher writes answers to the demo's prompts; its whole distribution at each of their tokens is kept
//! on disk. From it every setting is captured, encoded and decoded by the product's own code, and a
//! student is trained on what comes back, by the product's trainer, from the same start, on the same
//! tokens, with three seeds; that for three students. The measure is KL(teacher || student) over the whole vocabulary on prompts
//! that no student saw. Prints one JSON object a setting; `figures.json` has them all.

mod compare;
mod corpus;
mod distillkit;
mod pruning;
mod settings;
mod speed;
mod students;
mod training;

use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
};

use serde_json::{Value, json};

use crate::{students::Student, training::ONLINE};

pub type Failure = Box<dyn std::error::Error>;

/// Seeds of each training: order of the rows, and samples of the capture.
const SEEDS: u64 = 3;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [folder] => all(Path::new(folder)),
        [folder, "train", student, setting, seed] => {
            tch::set_num_threads(1);
            let folder = PathBuf::from(folder);
            let seed = seed.parse()?;
            let result = training::run(&folder, &Student::named(student)?, setting, seed)?;
            write(&result_path(&folder, student, setting, seed), &result)
        }
        [folder, "prune", spec, rate @ ..] if rate.len() < 2 => {
            let rate = rate.first().map(|rate| rate.parse()).transpose()?;
            println!("{}", pruning::run(Path::new(folder), spec, rate)?);
            Ok(())
        }
        _ => Err("usage: fidelity FOLDER [train STUDENT SETTING SEED | prune JSON [LEARNING_RATE]]".into()),
    }
}

fn all(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder.join("results"))?;
    let corpus = corpus::prepare(folder)?;
    let mut figures: Vec<Value> = Vec::new();
    for setting in settings::all() {
        let path = folder.join(format!("results/{}.json", setting.name));
        if !path.exists() {
            eprintln!("comparing {}", setting.name);
            write(&path, &compare::run(&corpus, &setting)?)?;
        }
        figures.push(read(&path)?);
    }
    let path = folder.join("results/speed.json");
    if !path.exists() {
        eprintln!("measuring speed: let nothing else run");
        write(&path, &speed::run(&corpus)?)?;
    }
    drop(corpus);
    train(folder)?;
    let of_seeds = |student: &Student, setting: &str| {
        (0..SEEDS).map(|seed| read(&result_path(folder, student.name, setting, seed))).collect::<Result<Vec<_>, _>>()
    };
    let mut students = Vec::new();
    for student in students::all() {
        let mut trained = serde_json::Map::new();
        for setting in student.trainings() {
            let runs = of_seeds(&student, &setting)?;
            trained.insert(setting, runs.into());
        }
        students.push(json!({
            "name": student.name, "layers": student.layers, "learning_rate": student.learning_rate,
            "freeze_embeddings": student.freeze_embeddings,
            "trained": trained,
        }));
    }
    let whole = json!({ "online": ONLINE, "settings": figures, "students": students, "speed": read(&path)? });
    println!("{whole}");
    write(&folder.join("figures.json"), &whole)
}

/// Every training that has no result yet, one process a core.
fn train(folder: &Path) -> Result<(), Failure> {
    let trainings = students::all().into_iter().flat_map(|student| {
        let each = move |seed| student.trainings().into_iter().map(move |setting| (student.name, setting, seed));
        (0..SEEDS).flat_map(each)
    });
    let mut left: Vec<(&str, String, u64)> =
        trainings.filter(|(student, setting, seed)| !result_path(folder, student, setting, *seed).exists()).collect();
    left.reverse();
    let at_once = std::thread::available_parallelism()?.get();
    let mut running: Vec<(Child, String)> = Vec::new();
    while !left.is_empty() || !running.is_empty() {
        while running.len() < at_once
            && let Some((student, setting, seed)) = left.pop()
        {
            eprintln!("training {student} on {setting}, seed {seed}; {} more wait", left.len());
            let seed_text = seed.to_string();
            std::fs::create_dir_all(folder.join("results").join(student))?;
            let child = Command::new(std::env::current_exe()?)
                .arg(folder)
                .args(["train", student, &setting, &seed_text])
                .env("OMP_NUM_THREADS", "1")
                .spawn()?;
            running.push((child, format!("{student} on {setting}, seed {seed}")));
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        let mut still = Vec::new();
        for (mut child, what) in running {
            match child.try_wait()? {
                Some(status) if status.success() => {}
                Some(status) => return Err(format!("training {what}: {status}").into()),
                None => still.push((child, what)),
            }
        }
        running = still;
    }
    Ok(())
}

fn result_path(folder: &Path, student: &str, setting: &str, seed: u64) -> PathBuf {
    folder.join(format!("results/{student}/{setting}-{seed}.json"))
}

fn write(path: &Path, value: &Value) -> Result<(), Failure> {
    let part = path.with_extension("part");
    std::fs::write(&part, serde_json::to_vec_pretty(value)?)?;
    Ok(std::fs::rename(part, path)?)
}

fn read(path: &Path) -> Result<Value, Failure> {
    let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}
