//! `mentee run --metrics-address`: the run's numbers for Prometheus, in its text format (prometheus.io, "Exposition
//! formats", 0.0.4), over plain HTTP. [`text`] writes them; the rest is a server that knows two answers.
//!
//! Whoever reaches the port reads names, losses and host names: no secrets, but no business of strangers. Without an
//! address nothing listens; a port alone listens on the loopback.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::failure::Failure;
use crate::interface;
use crate::snapshot::Part;
use crate::status::{Rank, State, Status};

/// A request's head is shorter.
const MAX_HEAD: usize = 8 * 1024;
/// A scraper that does not get on in this time is dropped.
const PATIENCE: Duration = Duration::from_secs(5);
/// More connections than these wait in the system's queue: a port scan takes no descriptors from the run.
const AT_ONCE: usize = 32;

/// What is exported; its owner replaces it.
#[derive(Debug, Clone)]
pub struct Exported(Arc<Mutex<Status>>);

impl Exported {
    /// From now on, this is what scrapers see.
    pub fn set(&self, status: &Status) {
        self.lock().clone_from(status);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Status> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `9477`, `0.0.0.0:9477`, `[::]:9477`, `ib0:9477`.
///
/// # Errors
/// [`Failure`] with exit code 2.
pub fn address(text: &str) -> Result<SocketAddr, Failure> {
    if let Ok(port) = text.parse() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let parts = text.rsplit_once(':').and_then(|(name, port)| Some((name, port.parse().ok()?)));
    let (name, port) = parts.filter(|(name, _)| !name.is_empty()).ok_or_else(|| {
        Failure::usage(format!("--metrics-address {text}: give PORT or ADDRESS:PORT, as 0.0.0.0:9477"))
    })?;
    Ok(SocketAddr::new(interface::address("--metrics-address", name)?, port))
}

/// Takes `address` (port 0: any).
///
/// # Errors
/// When the port is taken.
pub fn bind(address: SocketAddr) -> Result<std::net::TcpListener, Failure> {
    std::net::TcpListener::bind(address).map_err(|error| {
        Failure::failed(format!(
            "cannot listen at --metrics-address {address}: {error}; give another port, or 0 for any"
        ))
    })
}

/// Answers at `listener` until the runtime ends; says where that is.
///
/// # Errors
/// The system's.
pub fn serve(listener: std::net::TcpListener, status: &Status) -> Result<(SocketAddr, Exported), Failure> {
    let cannot = |error: std::io::Error| Failure::failed(format!("cannot serve --metrics-address: {error}"));
    listener.set_nonblocking(true).map_err(cannot)?;
    let listener = TcpListener::from_std(listener).map_err(cannot)?;
    let at = listener.local_addr().map_err(cannot)?;
    let exported = Exported(Arc::new(Mutex::new(status.clone())));
    tokio::spawn(answer_all(listener, exported.clone(), PATIENCE));
    Ok((at, exported))
}

async fn answer_all(listener: TcpListener, exported: Exported, patience: Duration) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((peer, _)) => {
                let answer = answer(peer, exported.clone());
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(patience, answer).await;
                    drop(place);
                });
            }
            // No descriptor left, or a peer that went at once: nothing to do but to wait.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn answer(mut peer: TcpStream, exported: Exported) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        match peer.read(&mut buffer).await? {
            0 => return Ok(()),
            count if head.len() + count > MAX_HEAD => return Ok(()),
            count => head.extend_from_slice(&buffer[..count]),
        }
    }
    let response = {
        let status = exported.lock();
        respond(&String::from_utf8_lossy(&head), &status)
    };
    peer.write_all(response.as_bytes()).await?;
    peer.shutdown().await
}

/// The answer to a request's head.
fn respond(head: &str, status: &Status) -> String {
    let mut words = head.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    let (code, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics" | "/") => ("200 OK", text(status)),
        ("GET" | "HEAD", _) => ("404 Not Found", "the numbers are at /metrics\n".into()),
        _ => ("405 Method Not Allowed", "only GET\n".into()),
    };
    let length = body.len();
    let body = if method == "HEAD" { String::new() } else { body };
    format!(
        "HTTP/1.1 {code}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

/// Families of samples in the making.
struct Page(String);

impl Page {
    /// A family; samples without a value are left out, a family without samples too.
    fn family(&mut self, name: &str, kind: &str, help: &str, samples: &[(String, Option<f64>)]) {
        let mut header = false;
        for (labels, value) in samples {
            let Some(value) = value else { continue };
            if !header {
                let _ = writeln!(self.0, "# HELP mentee_{name} {help}\n# TYPE mentee_{name} {kind}");
                header = true;
            }
            let value = match value {
                value if value.is_nan() => "NaN".to_owned(),
                value if value.is_infinite() => if *value > 0.0 { "+Inf" } else { "-Inf" }.to_owned(),
                value => value.to_string(),
            };
            let _ = writeln!(self.0, "mentee_{name}{labels} {value}");
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: Option<f64>) {
        self.family(name, "gauge", help, &[(String::new(), value)]);
    }
}

/// `{name="value",…}`, with what the format wants escaped.
fn labels(pairs: &[(&str, &str)]) -> String {
    let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<String> =
        pairs.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

/// A run's numbers. Names and units follow prometheus.io, "Metric and label naming": seconds, bytes, ratios.
pub fn text(status: &Status) -> String {
    let mut page = Page(String::new());
    let version = env!("CARGO_PKG_VERSION");
    let info = labels(&[("name", &status.name), ("host", &status.host), ("version", version)]);
    page.family("run_info", "gauge", "The run that this supervisor is at work on.", &[(info, Some(1.0))]);
    let states: Vec<(String, Option<f64>)> = [
        State::Starting,
        State::Running,
        State::Stopping,
        State::Restarting,
        State::Done,
        State::Preempted,
        State::Failed,
    ]
    .into_iter()
    .map(|state| (labels(&[("state", state.word())]), Some(f64::from(state == status.state))))
    .collect();
    page.family("run_state", "gauge", "1 for what the run is doing, 0 for everything else.", &states);
    let progress = &status.progress;
    // Before the first report there is nothing but zeros, which would look like a fall on every restart.
    let known = |value: u64| (progress.total_steps > 0).then_some(value as f64);
    page.gauge("step", "Optimizer steps completed.", known(progress.step));
    page.gauge("steps_planned", "Optimizer steps of the whole run.", known(progress.total_steps));
    page.gauge("epoch", "Epoch of the last step, from 0.", known(progress.epoch));
    page.gauge("loss", "Loss of the last logged step, mean over the global batch.", progress.loss);
    page.gauge(
        "z_std",
        "Spread of the student's normalised projections: about 1 when healthy, 0 when collapsed.",
        progress.z_std,
    );
    page.gauge("images_per_second", "Images a second, over all ranks.", progress.images_per_s);
    page.gauge("left_seconds", "Time left at the present rate.", status.eta_s);
    page.gauge(
        "knn_top1_ratio",
        "Nearest-neighbour accuracy of frozen features at the last evaluation.",
        status.knn_top1.map(|percent| percent / 100.0),
    );
    page.gauge("workers", "Ranks of the present world.", Some(f64::from(status.workers)));
    page.gauge("generation", "Which start of the ranks this is, from 0.", Some(f64::from(status.generation)));
    let restarts = [(String::new(), Some(f64::from(status.restarts)))];
    page.family("restarts_total", "counter", "Restarts of the ranks by this supervisor.", &restarts);

    let mut ranks = |name: &str, help: &str, value: &dyn Fn(&Rank) -> Option<f64>| {
        let samples: Vec<(String, Option<f64>)> = status
            .ranks
            .iter()
            .map(|(rank, at)| (labels(&[("rank", &rank.to_string()), ("host", &at.host)]), value(at)))
            .collect();
        page.family(name, "gauge", help, &samples);
    };
    ranks("rank_step", "Optimizer steps that this rank has completed.", &|at| Some(at.step as f64));
    ranks("rank_step_seconds", "Time of a step on this rank.", &|at| at.step_ms.map(|ms| ms / 1e3));
    let parts: [(&str, &str, Part); 5] = [
        ("rank_data_wait_seconds", "Time in a step that this rank waits for its loader.", |it| {
            it.data_wait_ms
        }),
        ("rank_forward_seconds", "Time in a step for the forward pass.", |it| it.forward_ms),
        ("rank_backward_seconds", "Time in a step for the backward pass.", |it| it.backward_ms),
        (
            "rank_communication_seconds",
            "Time in a step for exchanging with other ranks and waiting for them.",
            |it| it.comm_ms,
        ),
        ("rank_update_seconds", "Time in a step for optimizer, teacher and records.", |it| it.update_ms),
    ];
    for (name, help, part) in parts {
        ranks(name, help, &|at| at.times.as_ref().map(|times| part(times) / 1e3));
    }
    ranks("rank_resident_memory_bytes", "Memory of this rank's process.", &|at| {
        at.rss_mb.map(|mb| mb * f64::from(1 << 20))
    });
    let phases: Vec<(String, Option<f64>)> = status
        .ranks
        .iter()
        .map(|(rank, at)| {
            let phase = at.phase.to_string().replace(' ', "_");
            (labels(&[("rank", &rank.to_string()), ("host", &at.host), ("phase", &phase)]), Some(1.0))
        })
        .collect();
    page.family("rank_phase", "gauge", "1 for what this rank is doing.", &phases);
    page.0
}

#[cfg(test)]
mod tests {
    use mentee_cluster::{Phase, StepTimes};

    use super::*;

    fn status() -> Status {
        let mut status = Status::new("byol \"small\"\\\n", 2);
        status.state = State::Running;
        status.host = "node1".into();
        (status.progress.step, status.progress.total_steps) = (450, 1000);
        (status.progress.loss, status.progress.z_std) = (Some(f64::NAN), Some(0.93));
        (status.knn_top1, status.restarts) = (Some(41.5), 1);
        for rank in 0..2 {
            let times = StepTimes { data_wait_ms: 2.5, comm_ms: 60.0, ..StepTimes::default() };
            status.ranks.insert(
                rank,
                Rank {
                    host: "node1".into(),
                    pid: 7,
                    step: 450,
                    phase: Phase::DataWait,
                    step_ms: Some(441.0),
                    times_slower: None,
                    times: (rank == 0).then_some(times),
                    rss_mb: Some(1.5),
                },
            );
        }
        status
    }

    #[test]
    fn samples_are_those_of_the_status_in_base_units() {
        let text = text(&status());
        for line in [
            "mentee_run_info{name=\"byol \\\"small\\\"\\\\\\n\",host=\"node1\",version=\"0.1.0\"} 1",
            "mentee_run_state{state=\"running\"} 1",
            "mentee_run_state{state=\"done\"} 0",
            "mentee_step 450",
            "mentee_loss NaN",
            "mentee_z_std 0.93",
            "mentee_knn_top1_ratio 0.415",
            "# TYPE mentee_restarts_total counter",
            "mentee_restarts_total 1",
            "mentee_rank_step_seconds{rank=\"1\",host=\"node1\"} 0.441",
            "mentee_rank_data_wait_seconds{rank=\"0\",host=\"node1\"} 0.0025",
            "mentee_rank_resident_memory_bytes{rank=\"0\",host=\"node1\"} 1572864",
            "mentee_rank_phase{rank=\"0\",host=\"node1\",phase=\"data_wait\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
        assert!(!text.contains("mentee_images_per_second"), "what is not known has no sample");
        assert!(!text.contains("mentee_rank_data_wait_seconds{rank=\"1\""));
    }

    #[tokio::test]
    async fn connections_that_say_nothing_hold_nobody_up_for_long() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let exported = Exported(Arc::new(Mutex::new(status())));
        tokio::spawn(answer_all(listener, exported.clone(), Duration::from_millis(100)));
        let mut silent = Vec::new();
        for _ in 0..2 * AT_ONCE {
            silent.push(TcpStream::connect(at).await.unwrap());
        }
        tokio::time::sleep(Duration::from_millis(20)).await; // each holds what it shows and a place, or waits
        assert!(Arc::strong_count(&exported.0) <= 2 + AT_ONCE, "{}", Arc::strong_count(&exported.0));
        let mut scraper = TcpStream::connect(at).await.unwrap();
        scraper.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").await.unwrap();
        let mut page = String::new();
        scraper.read_to_string(&mut page).await.unwrap();
        assert!(page.starts_with("HTTP/1.1 200 OK") && page.contains("mentee_step 450"), "{page}");
    }

    /// Every line is a comment or `name{labels} value`; every family is described once, before its samples, and in one piece.
    #[test]
    fn the_page_keeps_to_the_format() {
        let text = text(&status());
        assert!(text.ends_with('\n'));
        let mut family = String::new();
        let mut seen = std::collections::BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split(' ').next().expect("a name").to_owned();
                assert!(seen.insert(family.clone()), "{family} comes twice");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type");
                assert_eq!(name, family);
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            } else {
                let (sample, value) = line.rsplit_once(' ').expect("a value");
                assert_eq!(sample.split('{').next(), Some(family.as_str()), "{line}");
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(
                    family.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_'),
                    "{line}"
                );
            }
        }
        assert!(seen.len() > 15, "{seen:?}");
    }

    #[test]
    fn addresses() {
        let table = [
            ("9477", "127.0.0.1:9477"),
            ("0.0.0.0:9477", "0.0.0.0:9477"),
            ("[::1]:1", "[::1]:1"),
            ("lo:80", "127.0.0.1:80"),
        ];
        for (text, parsed) in table {
            assert_eq!(address(text).expect("an address").to_string(), parsed);
        }
        for text in ["", ":80", "localhost", "99999", "lo:", "no-such0:1"] {
            assert_eq!(address(text).expect_err("none").exit_code, 2, "{text}");
        }
    }

    #[test]
    fn requests_are_answered_over_the_wire() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let anywhere = address("0").expect("an address");
            let (at, exported) = serve(bind(anywhere).expect("a port"), &status()).expect("served");
            let mut later = status();
            later.progress.step = 451;
            exported.set(&later);
            let ask = async |request: &str| {
                let mut peer = TcpStream::connect(at).await.expect("connected");
                peer.write_all(request.as_bytes()).await.expect("sent");
                let mut answer = String::new();
                peer.read_to_string(&mut answer).await.expect("an answer");
                answer
            };
            let page = ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
            assert!(
                page.starts_with("HTTP/1.1 200 OK\r\n") && page.contains("\nmentee_step 451\n"),
                "{page}"
            );
            let (head, body) = page.split_once("\r\n\r\n").expect("a body");
            assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
            assert!(ask("GET /x HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404"));
            assert!(ask("POST /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405"));
            assert!(ask("HEAD /metrics HTTP/1.0\r\n\r\n").await.ends_with("\r\n\r\n"));
            assert!(bind(at).expect_err("taken").line.contains("another port"));
        });
    }
}
