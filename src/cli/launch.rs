//! `fulgur launch`: one command in several processes, which are the ranks of a job.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};

use super::answer::{Answer, Status};
use super::context::Context;

/// Between two looks at the processes.
const POLL: Duration = Duration::from_millis(50);
/// How long the others may take to end by themselves after one has failed.
const GRACE: Duration = Duration::from_secs(30);
/// Most processes: beyond all reason on one host.
const MOST: usize = 1024;
/// How errors begin on standard error.
const ERROR: &str = "error: ";

/// Run a command of this program in several processes, the ranks of a job
///
/// Each process finds its rank in RANK, LOCAL_RANK and WORLD_SIZE, and rank 0 at MASTER_ADDR and MASTER_PORT. Rank 0 answers;
/// what the others say goes to standard error behind their number. If one fails the others end too, and its error is the
/// answer.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur launch --procs 2 -- train recipes/english.toml --set distributed.sequence=2"
)]
pub(super) struct Arguments {
    /// Number of processes
    #[arg(long, value_name = "N")]
    procs: usize,
    /// Where rank 0 listens; a free port by default
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// A process and what it says.
struct Rank {
    child: Child,
    /// Its last line that is an error.
    error: Arc<Mutex<Option<String>>>,
    stderr: JoinHandle<()>,
    ended: Option<ExitStatus>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let count = arguments.procs;
    if count == 0 || count > MOST {
        bail!("--procs is {count}, expected 1 to {MOST}");
    }
    let port = match arguments.port {
        Some(port) => port,
        None => free_port()?,
    };
    let program = std::env::current_exe().context("cannot find this program")?;
    let job = format!("{}-{port}", std::process::id());
    let mut ranks = Vec::with_capacity(count);
    for number in 0..count {
        let mut command = Command::new(&program);
        command
            .args(&arguments.command)
            .env("RANK", number.to_string())
            .env("LOCAL_RANK", number.to_string())
            .env("WORLD_SIZE", count.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .env("FULGUR_JOB", &job)
            .stdin(Stdio::null())
            .stdout(if number == 0 {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stderr(Stdio::piped());
        if context.json {
            command.arg("--json");
        }
        match start(command, number) {
            Ok(rank) => ranks.push(rank),
            Err(error) => {
                end(&mut ranks);
                return Err(error.context(format!("rank {number}: cannot start")));
            }
        }
    }
    let stdout = ranks[0].child.stdout.take();
    let answer = std::thread::spawn(move || {
        let mut text = String::new();
        // A rank that ends in the middle of its answer has failed, which is said by its exit code.
        stdout.map(|mut out| out.read_to_string(&mut text));
        text
    });
    let failed = watch(context, &mut ranks);
    for rank in &mut ranks {
        // Its lines are told before the answer.
        let idle = std::thread::spawn(|| ());
        std::mem::replace(&mut rank.stderr, idle).join().ok();
    }
    let text = answer
        .join()
        .map_err(|_| anyhow!("the answer of rank 0 was lost"))?;
    if let Some(number) = failed {
        return Err(anyhow!(why(&ranks[number], number)));
    }
    let partial = ranks
        .iter()
        .any(|rank| rank.ended.is_some_and(|status| !status.success()));
    let status = if partial { Status::Partial } else { Status::Done };
    Ok(Answer::printed(text, status))
}

fn start(mut command: Command, number: usize) -> anyhow::Result<Rank> {
    let mut child = command.spawn()?;
    let error = Arc::new(Mutex::new(None));
    let (stderr, last) = (child.stderr.take(), error.clone());
    let stderr = std::thread::spawn(move || {
        let Some(stderr) = stderr else { return };
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            match line.strip_prefix(ERROR) {
                Some(words) => {
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(words.to_owned());
                }
                None if number == 0 => eprintln!("{line}"),
                None => eprintln!("rank {number}: {line}"),
            }
        }
    });
    Ok(Rank {
        child,
        error,
        stderr,
        ended: None,
    })
}

/// Waits for all processes; the first one that failed, where one did.
fn watch(context: &Context, ranks: &mut [Rank]) -> Option<usize> {
    let (mut failed, mut deadline, mut told) = (None, None, false);
    loop {
        for (number, rank) in ranks.iter_mut().enumerate() {
            if rank.ended.is_none()
                && let Ok(Some(status)) = rank.child.try_wait()
            {
                rank.ended = Some(status);
                if !is_good(status) {
                    failed.get_or_insert(number);
                    deadline.get_or_insert(Instant::now() + GRACE);
                }
            }
        }
        if ranks.iter().all(|rank| rank.ended.is_some()) {
            return failed;
        }
        if context.interrupt.requested() && !told {
            // A terminal has told all of them already; twice would end them at once.
            told = true;
            deadline = None;
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            end(ranks);
            deadline = None;
        }
        sleep(POLL);
    }
}

/// Whether a process has ended as it should: done, or done in part.
fn is_good(status: ExitStatus) -> bool {
    matches!(status.code(), Some(0 | 1))
}

fn end(ranks: &mut [Rank]) {
    for rank in ranks.iter_mut().filter(|rank| rank.ended.is_none()) {
        // One that has ended meanwhile needs no more.
        rank.child.kill().ok();
    }
}

/// Why a process failed.
fn why(rank: &Rank, number: usize) -> String {
    let said = rank.error.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let prefix = format!("rank {number}: ");
    match (said, rank.ended) {
        (Some(words), _) if words.starts_with(&prefix) => words,
        (Some(words), _) => prefix + &words,
        (None, Some(status)) => format!("{prefix}ended with {status} and said nothing"),
        (None, None) => format!("{prefix}was lost"),
    }
}

fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no free port")?;
    Ok(listener.local_addr()?.port())
}
