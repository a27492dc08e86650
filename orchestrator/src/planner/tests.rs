use std::path::Path;

use proptest::prelude::*;
use retort_core::{
    Code, Result,
    id::JobId,
    spec::JobSpec,
    state::{Split, TaskKind, TaskState},
};

use super::*;

fn spec(shard_rows: u32, batch_rows: u32, passes: u32) -> JobSpec {
    let mut spec = crate::testing::spec(Path::new("/data"));
    spec.prompts.shard_rows = shard_rows;
    spec.train.batch_rows = batch_rows;
    spec.train.passes = passes;
    spec
}

fn slices(tasks: &[PlannedTask]) -> Vec<Slice> {
    let mut slices: Vec<Slice> = tasks.iter().filter_map(|task| task.slice).collect();
    slices.sort_by_key(|slice| slice.shard);
    slices
}

proptest! {
    #[test]
    fn every_row_lies_in_exactly_one_shard(train in 1u64..3000, held_out in 1u64..500, shard_rows in 1u32..200) {
        let rows = RowCounts::generated(train, held_out, 16, 0);
        let (plan, tasks) = plan(&spec(shard_rows, 8, 3), &rows, 0, 0, 100).unwrap();
        let slices = slices(&tasks);

        // Indices count from 0 without a gap; rows follow each other without a gap.
        let mut next_row = 0;
        for (index, slice) in slices.iter().enumerate() {
            prop_assert_eq!(slice.shard as usize, index);
            prop_assert_eq!(slice.first_row, next_row);
            prop_assert!(slice.rows >= 1 && slice.rows <= shard_rows);
            next_row += u64::from(slice.rows);
            // No shard mixes splits, training ones first.
            let split = if slice.first_row < train { Split::Train } else { Split::HeldOut };
            prop_assert_eq!(slice.split, split);
            prop_assert!(split == Split::HeldOut || next_row <= train);
            prop_assert!(plan.shards_of(split).contains(&slice.shard));
            // Only a split's last shard is short.
            let last = slice.shard + 1 == plan.shards_of(split).end;
            prop_assert!(slice.rows == shard_rows || last);
        }
        prop_assert_eq!(next_row, train + held_out);
        prop_assert_eq!(plan.shards() as usize, slices.len());
        prop_assert_eq!(u64::from(plan.train_shards), train.div_ceil(shard_rows.into()));
    }

    #[test]
    fn totals_follow_from_the_spec(
        train in 1u64..3000, held_out in 1u64..500, batch_rows in 1u32..64, passes in 1u32..20, max_new in 1u32..4096,
    ) {
        let rows = RowCounts::generated(train, held_out, max_new, 0);
        let (plan, tasks) = plan(&spec(16, batch_rows, passes), &rows, 11, 5, 100).unwrap();
        prop_assert_eq!(u64::from(plan.optimizer_steps), train.div_ceil(batch_rows.into()) * u64::from(passes));
        prop_assert_eq!(plan.max_target_tokens, (train + held_out) * u64::from(max_new));
        prop_assert!(plan.max_store_bytes >= plan.max_target_tokens);
        prop_assert_eq!((plan.teacher_parameters, plan.student_parameters), (11, 5));

        let others: Vec<_> = tasks.iter().filter(|task| task.slice.is_none()).map(|task| (task.kind, task.state)).collect();
        prop_assert_eq!(others, [(TaskKind::Train, TaskState::Ready), (TaskKind::Evaluate, TaskState::Waiting)]);
    }

    #[test]
    fn planning_twice_names_the_same_tasks(train in 1u64..300, held_out in 1u64..50) {
        let rows = RowCounts::generated(train, held_out, 16, 0);
        let job = JobId::generate();
        let once = plan(&spec(7, 8, 1), &rows, 0, 0, 100).unwrap();
        let twice = plan(&spec(7, 8, 1), &rows, 0, 0, 100).unwrap();
        prop_assert_eq!(&once, &twice);
        let mut ids: Vec<_> = once.1.iter().map(|task| task.id(&job)).collect();
        let count = ids.len();
        ids.sort();
        ids.dedup();
        prop_assert_eq!(ids.len(), count);
    }
}

#[test]
fn some_held_out_rows_go_first_and_the_rest_last() -> Result<()> {
    let order = |shard_rows, train, held_out| -> Result<Vec<(u32, Split)>> {
        let (_, mut tasks) = plan(&spec(shard_rows, 8, 1), &RowCounts::generated(train, held_out, 8, 0), 0, 0, 100)?;
        tasks.sort_by_key(|task| (task.priority, task.slice.map(|slice| slice.shard)));
        Ok(tasks.iter().filter_map(|task| task.slice).map(|slice| (slice.shard, slice.split)).collect())
    };
    use Split::{HeldOut, Train};
    assert_eq!(order(32, 64, 96)?, [(2, HeldOut), (3, HeldOut), (0, Train), (1, Train), (4, HeldOut)]);
    assert_eq!(order(4, 4, 20)?, [(1, HeldOut), (2, HeldOut), (3, HeldOut), (4, HeldOut), (0, Train), (5, HeldOut)]);
    Ok(())
}

#[test]
fn a_split_without_rows_is_refused() {
    for rows in [RowCounts::generated(0, 5, 8, 0), RowCounts::generated(5, 0, 8, 0)] {
        assert_eq!(plan(&spec(4, 4, 1), &rows, 0, 0, 100).unwrap_err().code, Code::PromptSetTooSmall);
    }
}

#[test]
fn what_cannot_be_counted_is_refused() {
    let rows = RowCounts::generated(u64::from(u32::MAX), 10, 8, 0);
    assert_eq!(plan(&spec(1, 1, 1), &rows, 0, 0, 100).unwrap_err().code, Code::SpecInvalid);
    assert_eq!(
        plan(&spec(4096, 1, 10_000), &RowCounts::generated(4_000_000, 10, 8, 0), 0, 0, 100).unwrap_err().code,
        Code::SpecInvalid
    );
}
