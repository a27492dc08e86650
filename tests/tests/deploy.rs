//! What lies in `deploy/` says what the programs understand. Parsed and compared, never applied: that
//! takes a cluster, or a container engine.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{collections::BTreeSet, path::PathBuf, process::Command};

use retort_tests::retort::programs;
use serde_json::Value;

const PROGRAMS: [&str; 4] = ["retort-broker", "retort-orchestrator", "retort-teacher", "retort-student"];

fn text(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(path: &str) -> Value {
    serde_saphyr::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(|item| item.as_str().unwrap().to_owned()).collect()
}

/// Every flag of a command line is one that its program has, and says its value after `=`.
fn check_command(command: &[String]) {
    let program = command[0].as_str();
    assert!(PROGRAMS.contains(&program), "{program} is none of retort's programs");
    let path = programs().join(program);
    let output =
        Command::new(&path).arg("--help").output().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    let known: BTreeSet<&str> = help.split_whitespace().filter(|word| word.starts_with("--")).collect();
    for argument in &command[1..] {
        let (flag, value) = argument.split_once('=').unwrap_or_else(|| panic!("{program} {argument} has no value"));
        assert!(known.contains(flag), "{program} has no {flag}");
        assert!(!value.is_empty(), "{program} {flag}");
    }
}

fn flag<'a>(command: &'a [String], name: &str) -> Option<&'a str> {
    command.iter().find_map(|argument| argument.strip_prefix(name)?.strip_prefix('='))
}

#[test]
fn the_group_of_the_manifest_is_two_pods_that_live_and_die_together() {
    let manifest = yaml("kubernetes/teacher-group.yaml");
    assert_eq!(manifest["apiVersion"], "leaderworkerset.x-k8s.io/v1");
    assert_eq!(manifest["kind"], "LeaderWorkerSet");
    let template = &manifest["spec"]["leaderWorkerTemplate"];
    assert_eq!(template["size"], 2);
    assert_eq!(template["restartPolicy"], "RecreateGroupOnPodRestart");
    let pod = &template["workerTemplate"]["spec"];
    let container = &pod["containers"][0];
    let command = strings(&container["command"]);
    check_command(&command);
    let devices = flag(&command, "--device").unwrap().split(',').count();
    assert_eq!(container["resources"]["limits"]["nvidia.com/gpu"], devices.to_string(), "a GPU that nobody uses");
    // The stage comes from the controller's variables, so none is written down.
    assert_eq!((flag(&command, "--stage"), flag(&command, "--peers")), (None, None));
    let port = flag(&command, "--listen").unwrap().rsplit(':').next().unwrap();
    assert_eq!(container["ports"][0]["containerPort"].to_string(), port);
    assert_eq!(container["readinessProbe"]["tcpSocket"]["port"], container["ports"][0]["name"]);

    // What is used is mounted, and what is mounted is there.
    let mounts = container["volumeMounts"].as_array().unwrap();
    let volumes: BTreeSet<_> =
        pod["volumes"].as_array().unwrap().iter().map(|volume| volume["name"].as_str()).collect();
    assert_eq!(mounts.iter().map(|mount| mount["name"].as_str()).collect::<BTreeSet<_>>(), volumes);
    for name in ["--store", "--tls-ca", "--tls-cert", "--tls-key"] {
        let path = flag(&command, name).unwrap();
        assert!(mounts.iter().any(|mount| path.starts_with(mount["mountPath"].as_str().unwrap())), "{name} {path}");
    }
}

#[test]
fn the_compose_file_is_a_whole_retort_with_a_teacher_of_two_stages() {
    let compose = yaml("compose/compose.yaml");
    let services = compose["services"].as_object().unwrap();
    let names: Vec<_> = services.keys().map(String::as_str).collect();
    let mut started = BTreeSet::new();
    let mut stages = Vec::new();
    for (name, service) in services {
        let command = strings(&service["command"]);
        check_command(&command);
        started.insert(command[0].clone());
        for other in strings(&service["depends_on"]) {
            assert!(names.contains(&other.as_str()), "{name} waits for {other}, which is no service");
        }
        // Every address is that of a service, at the port on which it listens.
        for peer in
            ["--brokers", "--orchestrator", "--peers", "--advertise"].into_iter().filter_map(|it| flag(&command, it))
        {
            for address in peer.trim_start_matches("http://").split(',') {
                let (host, port) = address.split_once(':').unwrap();
                let listen = strings(&services[host]["command"]);
                assert_eq!(flag(&listen, "--listen"), Some(format!("0.0.0.0:{port}").as_str()), "{name}: {address}");
            }
        }
        stages.extend(
            flag(&command, "--stage").map(|stage| (stage.to_owned(), flag(&command, "--peers").map(str::to_owned))),
        );
        let store = service["volumes"].as_array().unwrap().iter().any(|volume| volume == "store:/srv/retort/store");
        assert_eq!(store, flag(&command, "--store").is_some(), "{name}");
        assert_eq!(service["build"]["dockerfile"], "deploy/image/Dockerfile");
    }
    assert_eq!(started, PROGRAMS.map(str::to_owned).into());
    let peers = Some("teacher-0:7600,teacher-1:7600".to_owned());
    assert_eq!(stages, [("0/2".to_owned(), peers.clone()), ("1/2".to_owned(), peers)]);
    for volume in ["state", "store"] {
        assert!(compose["volumes"].as_object().unwrap().contains_key(volume));
    }
}

#[test]
fn the_image_holds_every_program() {
    let dockerfile = text("image/Dockerfile");
    for program in PROGRAMS.into_iter().chain(["retort"]) {
        assert!(dockerfile.contains(&format!("/target/debug/{program} ")), "{program}");
    }
}
