use super::*;

#[tokio::test]
async fn a_second_orchestrator_is_kept_out_until_the_first_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/retort.sqlite");
    let first = Database::open(&path).await.unwrap();
    let error = Database::open(&path).await.unwrap_err();
    assert_eq!(error.code, Code::AlreadyRunning);
    assert!(error.message.contains("retort.sqlite"), "{}", error.message);
    first.close().await;
    drop(first);
    Database::open(&path).await.unwrap();
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("retort.sqlite");
    let database = Database::open(&path).await.unwrap();
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'from the future', 1, x'00', 0)",
    )
    .execute(&database.writer)
    .await
    .unwrap();
    database.close().await;
    drop(database);
    let error = Database::open(&path).await.unwrap_err();
    assert_eq!(error.code, Code::DatabaseTooNew);
    assert!(error.message.contains("schema version 9999 is newer than this program's (6)"), "{}", error.message);
}

#[tokio::test]
async fn a_file_of_another_kind_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("retort.sqlite");
    std::fs::write(&path, "this is a diary, not a database".repeat(100)).unwrap();
    let error = Database::open(&path).await.unwrap_err();
    assert_eq!(error.code, Code::DatabaseUnavailable);
    assert!(error.message.contains("damaged or is no SQLite file"), "{}", error.message);
}

#[tokio::test]
async fn what_is_not_committed_never_happened() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::open(&folder.path().join("retort.sqlite")).await.unwrap();
    let mut tx = database.begin().await.unwrap();
    offsets::store(&mut tx, 0, 7).await.unwrap();
    drop(tx);
    let mut tx = database.begin().await.unwrap();
    assert_eq!(offsets::list(&mut tx).await.unwrap(), []);
    offsets::store(&mut tx, 0, 8).await.unwrap();
    // Readers see committed states only.
    assert_eq!(offsets::list(&mut database.read().await.unwrap()).await.unwrap(), []);
    commit(tx).await.unwrap();
    assert_eq!(offsets::list(&mut database.read().await.unwrap()).await.unwrap(), [(0, 8)]);
}
