//! Who takes part in the next round, and with how many steps. Pure.

use std::collections::BTreeMap;

use super::exchange::Replica;

/// The replicas that a lead has heard of.
#[derive(Debug)]
pub struct Crew {
    inner_steps: u32,
    members: BTreeMap<u32, Member>,
}

#[derive(Debug)]
struct Member {
    epoch: u64,
    /// That it is given a round.
    steps: u32,
    /// It has a rest until it is ready for this round.
    ready_from: u32,
    /// The first round that it said it could take part in.
    ready: u32,
}

impl Crew {
    pub fn new(inner_steps: u32) -> Self {
        Self { inner_steps, members: BTreeMap::new() }
    }

    /// Takes note of who said to be ready from which round on, by number: epoch and round.
    pub fn hear(&mut self, ready: &BTreeMap<u32, (u64, u32)>) {
        for (&number, &(epoch, round)) in ready {
            let fresh = Member { epoch, steps: self.inner_steps, ready_from: 0, ready: round };
            match self.members.get_mut(&number) {
                Some(member) if member.epoch == epoch => member.ready = round,
                Some(member) if member.epoch > epoch => {}
                _ => drop(self.members.insert(number, fresh)),
            }
        }
    }

    /// Who takes part now, by number, and how many steps each wants.
    pub fn present(&self) -> Vec<(Replica, u32)> {
        let present = self.members.iter().filter(|(_, member)| member.ready >= member.ready_from);
        present.map(|(&number, member)| ((number, member.epoch), member.steps)).collect()
    }

    /// It delivered in time.
    pub fn came(&mut self, replica: Replica) {
        let most = self.inner_steps;
        if let Some(member) = self.member(replica) {
            member.steps = (member.steps + member.steps / 4 + 1).min(most);
        }
    }

    /// It did not deliver in `round` in time: it is given half as much, once it is ready again.
    pub fn missed(&mut self, replica: Replica, round: u32) {
        if let Some(member) = self.member(replica) {
            member.steps = (member.steps / 2).max(1);
            member.ready_from = round.saturating_add(1);
        }
    }

    fn member(&mut self, (number, epoch): Replica) -> Option<&mut Member> {
        self.members.get_mut(&number).filter(|member| member.epoch == epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_late_gets_less_and_who_is_gone_nothing() {
        let mut crew = Crew::new(20);
        crew.hear(&BTreeMap::from([(1, (1, 0)), (2, (1, 0))]));
        assert_eq!(crew.present(), [((1, 1), 20), ((2, 1), 20)]);
        crew.came((1, 1));
        crew.missed((2, 1), 0);
        assert_eq!(crew.present(), [((1, 1), 20)]);
        // Late, but there.
        crew.hear(&BTreeMap::from([(1, (1, 1)), (2, (1, 1))]));
        assert_eq!(crew.present(), [((1, 1), 20), ((2, 1), 10)]);
        crew.came((2, 1));
        assert_eq!(crew.present()[1], ((2, 1), 13));
        // Dead, and its task taken up by another attempt.
        crew.missed((2, 1), 1);
        crew.hear(&BTreeMap::from([(2, (2, 0))]));
        assert_eq!(crew.present(), [((1, 1), 20), ((2, 2), 20)]);
        crew.missed((2, 1), 2);
        crew.hear(&BTreeMap::from([(2, (1, 9))]));
        assert_eq!(crew.present()[1], ((2, 2), 20), "news of the attempt before change nothing");
        for round in 3..20 {
            crew.missed((1, 1), round);
        }
        crew.hear(&BTreeMap::from([(1, (1, 20))]));
        assert_eq!(crew.present()[0], ((1, 1), 1));
    }
}
