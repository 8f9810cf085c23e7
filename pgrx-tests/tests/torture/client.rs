//! A client: one connection after the other, one transaction after the other.

use std::thread;

use postgres::Client;

use crate::answer::{Answer, ask};
use crate::draw::one_of;
use crate::history::Pending;
use crate::prepared;
use crate::sqlstates;
use crate::transaction::{self, End, Plan, Step, Transaction};
use crate::verbs::{Kind, Level, Operation};
use crate::world::{CLIENT, World};

/// Every third client is an operator, and every third an ordinary worker.
fn level(number: u64) -> Level {
    match number % 6 {
        2 | 4 => Level::Operator,
        5 => Level::Worker,
        _ => Level::Superuser,
    }
}

/// Works until the phase is over.
pub fn run(world: &World, number: u64) {
    let level = level(number);
    let mut connection = None;
    let mut step = 0;
    while !world.is_over() {
        let mut rng = world.generator(number, step);
        if connection.is_none() {
            let options = options(&mut world.generator(number, step));
            connection = world.connect(level.role(), CLIENT, &options);
        }
        let Some(client) = connection.take() else { return };
        let who = format!("phase {} client {number}.{step}", world.phase);
        let mut turn = Turn {
            world,
            client,
            who,
            level,
            gid: format!("p{}-c{number}-{step}", world.phase),
            reads_only: false,
        };
        let is_there = match transaction::draw(&mut rng, number, level, world.setting.backlog) {
            Plan::Single(operation) => turn.single(&operation),
            Plan::Job(operations) => operations.iter().all(|operation| turn.single(operation)),
            Plan::Several(transaction) => turn.several(&transaction),
            Plan::Reconnect => false,
        };
        if is_there {
            connection = Some(turn.client);
        }
        step += 1;
    }
}

/// Time limits, on some connections so short that they are met.
fn options(rng: &mut fastrand::Rng) -> String {
    let limits = [
        ("lock_timeout", ["0", "0", "200", "20"]),
        ("statement_timeout", ["20000", "20000", "20000", "150"]),
        ("idle_in_transaction_session_timeout", ["0", "0", "700", "0"]),
    ];
    limits
        .iter()
        .map(|(name, values)| format!("-c {name}={}", one_of(rng, values)))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Whether the connection is still there.
type IsThere = bool;

/// One transaction of a client's.
struct Turn<'a> {
    world: &'a World<'a>,
    client: Client,
    who: String,
    level: Level,
    gid: String,
    reads_only: bool,
}

enum Outcome {
    Done,
    Refused,
    Lost,
}

impl Turn<'_> {
    fn perform(&mut self, operation: &Operation, pending: &mut Pending) -> Outcome {
        let (claim_id, held) = self.world.history.last_told(&operation.session);
        let sql = operation.sql.replace("{claim}", &claim_id.to_string()).replace("{held}", &held);
        let from = self.world.log.begin();
        let answer = ask(&mut self.client, &sql);
        self.world.log.note(from, &self.who, &sql, &answer);
        match answer {
            Answer::Rows(rows) => {
                self.world.history.read(operation.kind, &rows, pending, self.world.log);
                Outcome::Done
            }
            Answer::Refused { code, text } => {
                let worker = self.level == Level::Worker
                    || self.level == Level::Operator && operation.kind == Kind::Direct;
                if !sqlstates::is_documented(operation.kind, &code, self.reads_only, worker) {
                    self.world.log.violation(format!(
                        "an error that is not documented: {}: {sql}: {code}: {text}",
                        self.who
                    ));
                }
                Outcome::Refused
            }
            Answer::Lost { code, text } => {
                if !sqlstates::is_of_connections(code.as_deref()) {
                    self.world.log.violation(format!(
                        "a connection lost with an error that is not documented: {}: {sql}: {code:?}: {text}",
                        self.who
                    ));
                }
                Outcome::Lost
            }
        }
    }

    fn control(&mut self, sql: impl Into<String>) -> Outcome {
        self.perform(&Operation::control(sql), &mut Pending::default())
    }

    fn single(&mut self, operation: &Operation) -> IsThere {
        let mut pending = Pending::default();
        match self.perform(operation, &mut pending) {
            Outcome::Done => self.world.history.commit(pending),
            // It was told of nothing.
            Outcome::Refused => {}
            Outcome::Lost => return false,
        }
        true
    }

    fn several(&mut self, transaction: &Transaction) -> IsThere {
        self.reads_only = transaction.reads_only;
        let mut pending = Pending::default();
        match self.control(transaction.begin.as_str()) {
            Outcome::Done => {}
            Outcome::Refused => return true,
            Outcome::Lost => return false,
        }
        for step in &transaction.steps {
            match self.step(step, &mut pending) {
                Outcome::Done => {}
                Outcome::Refused => return self.roll_back(pending),
                Outcome::Lost => return false,
            }
        }
        match transaction.end {
            End::Commit => match self.control("COMMIT") {
                Outcome::Done => self.world.history.commit(pending),
                Outcome::Refused => self.world.history.roll_back(pending),
                Outcome::Lost => return false,
            },
            End::Rollback => return self.roll_back(pending),
            End::Drop => return false,
            End::Prepare { by_itself, commits } => {
                return self.prepare(pending, by_itself, commits);
            }
        }
        true
    }

    fn roll_back(&mut self, pending: Pending) -> IsThere {
        match self.control("ROLLBACK") {
            Outcome::Done => self.world.history.roll_back(pending),
            Outcome::Refused => {}
            Outcome::Lost => return false,
        }
        true
    }

    fn step(&mut self, step: &Step, pending: &mut Pending) -> Outcome {
        match step {
            Step::Do(operation) => self.perform(operation, pending),
            Step::Stop(time) => {
                thread::sleep(*time);
                Outcome::Done
            }
            Step::Within { steps, is_undone } => self.within(steps, *is_undone, pending),
        }
    }

    fn within(&mut self, steps: &[Operation], is_undone: bool, pending: &mut Pending) -> Outcome {
        match self.control("SAVEPOINT here") {
            Outcome::Done => {}
            other => return other,
        }
        let mark = pending.mark();
        let mut is_undone = is_undone;
        for operation in steps {
            match self.perform(operation, pending) {
                Outcome::Done => {}
                Outcome::Refused => {
                    is_undone = true;
                    break;
                }
                Outcome::Lost => return Outcome::Lost,
            }
        }
        if !is_undone {
            return self.control("RELEASE here");
        }
        match self.control("ROLLBACK TO here") {
            Outcome::Done => self.world.history.roll_back(pending.split_off(mark)),
            other => return other,
        }
        self.control("RELEASE here")
    }

    fn prepare(&mut self, pending: Pending, by_itself: bool, commits: bool) -> IsThere {
        let gid = prepared::name(&self.gid, by_itself, commits);
        self.world.history.prepare(&gid, pending);
        let prepare = Operation::new(Kind::Prepare, "", format!("PREPARE TRANSACTION '{gid}'"));
        match self.perform(&prepare, &mut Pending::default()) {
            Outcome::Done => {}
            Outcome::Refused => {
                self.world.history.settle(&gid, false);
                return true;
            }
            Outcome::Lost => return false,
        }
        if !by_itself {
            return true;
        }
        let end = Operation::new(Kind::EndPrepared, "", prepared::end(&gid));
        match self.perform(&end, &mut Pending::default()) {
            Outcome::Done => self.world.history.settle(&gid, commits),
            // Whoever looks after those that are left will try again.
            Outcome::Refused => {}
            Outcome::Lost => return false,
        }
        true
    }
}
