//! Which environment a command means: the one that was named; else that of the current folder's environment file, when
//! it exists; else the only one there is; else the user must say.

use diorama_api::{EnvironmentStatus, ErrorKind};
use diorama_topology::EnvironmentName;

use crate::environment_file;
use crate::failure::Failure;
use crate::session::Session;

/// The environment that a command works on.
///
/// # Errors
/// When there is none, or several and no way to tell.
pub async fn choose(session: &Session<'_>) -> Result<EnvironmentName, Failure> {
    if let Some(name) = session.named() {
        return Ok(name.clone());
    }
    let all = session.client().environments().await?;
    let here = environment_file::in_current_folder().map(|environment| environment.name);
    let chosen = pick(&all, here.as_ref())?;
    session.output().detail(|| format!("environment {chosen}"));
    Ok(chosen)
}

/// What a snapshot's name is looked up in first, where several environments have a snapshot of that name. Nothing is
/// lost when it does not exist: snapshots outlive environments.
pub fn scope(session: &Session<'_>) -> Option<EnvironmentName> {
    session
        .named()
        .cloned()
        .or_else(|| environment_file::in_current_folder().map(|environment| environment.name))
}

fn pick(all: &[EnvironmentStatus], here: Option<&EnvironmentName>) -> Result<EnvironmentName, Failure> {
    if let Some(here) = here
        && all.iter().any(|environment| environment.name == *here)
    {
        return Ok(here.clone());
    }
    match all {
        [] => Err(Failure::new(
            ErrorKind::NotFound,
            "there is no environment",
            "start one with `diorama up FILE`, or bring one back with `diorama restore SNAPSHOT`",
        )),
        [only] => Ok(only.name.clone()),
        several => {
            let names: Vec<&str> = several.iter().map(|environment| environment.name.as_ref()).collect();
            Err(Failure::new(
                ErrorKind::Ambiguous,
                format!("there are several environments: {}", names.join(", ")),
                "choose one with `--environment NAME` or the variable DIORAMA_ENVIRONMENT",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use diorama_api::EnvironmentState;

    use super::*;

    fn environments(names: &[&str]) -> Vec<EnvironmentStatus> {
        names
            .iter()
            .map(|name| EnvironmentStatus {
                name: name.parse().unwrap(),
                state: EnvironmentState::Up,
                epoch: 0,
                snapshot: None,
                started: None,
                operation: None,
                machines: Vec::new(),
                networks: Vec::new(),
                hosts: Vec::new(),
            })
            .collect()
    }

    #[test]
    fn the_folders_environment_then_the_only_one() {
        let here = "pair".parse().unwrap();
        for (all, here, expected) in [
            (&["pair", "other"][..], Some(&here), Ok("pair")),
            (&["other"], Some(&here), Ok("other")),
            (&["other"], None, Ok("other")),
            (&[], Some(&here), Err(ErrorKind::NotFound)),
            (&["other", "third"], Some(&here), Err(ErrorKind::Ambiguous)),
        ] {
            let picked = match pick(&environments(all), here) {
                Ok(name) => Ok(name.to_string()),
                Err(Failure::Error(error)) => Err(error.kind),
                Err(other) => panic!("{other:?}"),
            };
            assert_eq!(picked, expected.map(str::to_owned), "{all:?}");
        }
    }
}
