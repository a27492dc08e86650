//! Opens the object store that goes with a database.

use std::path::Path;

use retort_artifact::Store;
use retort_core::{Error, Result};

use crate::database::{Database, DatabaseResult as _};

/// The store at `location`. It is made if it is not there, unless the database at `path` speaks of objects: these lie in
/// a store that is away, and an empty one in its place would fail their jobs.
///
/// Errors: `store-unavailable` where there is none and none is made.
pub async fn open(database: &Database, path: &Path, location: &str) -> Result<Store> {
    if speaks_of_objects(database).await? {
        Store::open_existing(location).map_err(|error| {
            let message = format!(
                "{}; {} has jobs whose objects lie in it, so none is made: to begin without them, take another home \
                 (another --database)",
                error.message,
                path.display()
            );
            Error { message, ..error }
        })?;
    }
    Store::open(location)
}

async fn speaks_of_objects(database: &Database) -> Result<bool> {
    let mut snapshot = database.read().await?;
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM jobs) OR EXISTS (SELECT 1 FROM models) OR EXISTS (SELECT 1 FROM deletions)",
    )
    .fetch_one(&mut *snapshot)
    .await
    .db()
}

#[cfg(test)]
mod tests {
    use retort_core::Code;

    use super::*;
    use crate::testing::World;

    #[tokio::test]
    async fn a_database_with_jobs_has_its_store_already() {
        let world = World::new().await;
        let (database, path) = (&world.context.database, world.folder.path().join("retort.sqlite"));
        let place = world.folder.path().join("elsewhere");
        let location = place.to_str().unwrap();
        world.job().await;
        for why in ["there is no such folder", "the folder is empty"] {
            let error = open(database, &path, location).await.unwrap_err();
            assert_eq!(error.code, Code::StoreUnavailable);
            for part in [location, why, "--store", path.to_str().unwrap(), "another home"] {
                assert!(error.message.contains(part), "{part:?} in {}", error.message);
            }
            std::fs::create_dir_all(&place).unwrap();
        }
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0, "none is made");
        // The objects of an older build, of which nothing says yet which store they are.
        std::fs::create_dir(place.join("prompts")).unwrap();
        open(database, &path, location).await.unwrap();
        Store::open_existing(location).unwrap();
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 2, "it is marked");
    }

    #[tokio::test]
    async fn a_new_database_gets_a_new_store() {
        let world = World::new().await;
        let place = world.folder.path().join("else/where");
        let path = world.folder.path().join("retort.sqlite");
        open(&world.context.database, &path, place.to_str().unwrap()).await.unwrap();
        Store::open_existing(place.to_str().unwrap()).unwrap();
    }
}
