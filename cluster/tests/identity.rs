//! The environments that launchers leave behind, as recorded on real machines and in their documentation, and the
//! place in the job each of them means.

use mentee_cluster::identity::{
    Allocation, Identity, IdentityError, affinity_advice, discover, expand_nodes, visible_devices,
};

fn identity(environment: &[&str]) -> Result<Identity, IdentityError> {
    discover(&|name| {
        environment
            .iter()
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))
            .map(|(_, value)| value.to_owned())
    })
}

/// What Slurm 22.05 sets in a step of `srun -N2 -n4 --ntasks-per-node=2`, here as task 3.
const SRUN_3_OF_4: &[&str] = &[
    "SLURM_JOB_ID=7",
    "SLURM_STEP_ID=0",
    "SLURM_PROCID=3",
    "SLURM_LOCALID=1",
    "SLURM_NODEID=1",
    "SLURM_NTASKS=4",
    "SLURM_NPROCS=4",
    "SLURM_NNODES=2",
    "SLURM_STEP_NUM_TASKS=4",
    "SLURM_TASKS_PER_NODE=2(x2)",
    "SLURM_STEP_TASKS_PER_NODE=2(x2)",
    "SLURM_GTIDS=2,3",
];
/// The batch script of the same job: rank 0 of 4 by its variables, and no rank at all.
const BATCH_SCRIPT: &[&str] = &[
    "SLURM_JOB_ID=7",
    "SLURM_PROCID=0",
    "SLURM_LOCALID=0",
    "SLURM_NODEID=0",
    "SLURM_NTASKS=4",
    "SLURM_NPROCS=4",
    "SLURM_TASKS_PER_NODE=2(x2)",
];
const OPEN_MPI_1_OF_2: &[&str] = &[
    "OMPI_COMM_WORLD_RANK=1",
    "OMPI_COMM_WORLD_SIZE=2",
    "OMPI_COMM_WORLD_LOCAL_RANK=1",
    "OMPI_COMM_WORLD_LOCAL_SIZE=2",
    "OMPI_COMM_WORLD_NODE_RANK=1",
    "OMPI_UNIVERSE_SIZE=2",
    "OMPI_MCA_orte_hnp_uri=1803026432.0;tcp://10.0.0.1:33261",
    "PMIX_RANK=1",
    "PMIX_NAMESPACE=1803026433",
];
const HYDRA_1_OF_2: &[&str] =
    &["PMI_RANK=1", "PMI_SIZE=2", "PMI_FD=9", "MPI_LOCALRANKID=1", "MPI_LOCALNRANKS=2"];

fn with(base: &[&'static str], more: &[&'static str]) -> Vec<&'static str> {
    // Earlier entries win, so that `more` overrides.
    more.iter().chain(base).copied().collect()
}

type Expected = (u32, u32, u32, u32, &'static str);

#[test]
fn every_launcher_is_understood() {
    let pmi = "PMI (MPICH, Intel or Cray MPI)";
    let srun_uneven = ["SLURM_STEP_TASKS_PER_NODE=3,1", "SLURM_TASKS_PER_NODE=3,1"];
    let table: Vec<(&str, Vec<&'static str>, Expected)> = vec![
        ("a plain shell", vec![], (0, 1, 0, 1, "none")),
        ("a shell with unrelated variables", vec!["PATH=/bin", "MASTER_PORT=29500"], (0, 1, 0, 1, "none")),
        (
            "mentee run, engine direct",
            vec!["MENTEE_RANK=0", "MENTEE_WORLD_SIZE=1", "MENTEE_LOCAL_RANK=0", "MENTEE_LOCAL_SIZE=1"],
            (0, 1, 0, 1, "mentee"),
        ),
        (
            "own variables, second machine",
            vec!["MENTEE_RANK=5", "MENTEE_WORLD_SIZE=8", "MENTEE_LOCAL_RANK=1", "MENTEE_LOCAL_SIZE=4"],
            (5, 8, 1, 4, "mentee"),
        ),
        (
            "torchrun, second node of two",
            vec![
                "RANK=5",
                "WORLD_SIZE=8",
                "LOCAL_RANK=1",
                "LOCAL_WORLD_SIZE=4",
                "GROUP_RANK=1",
                "ROLE_RANK=5",
                "MASTER_ADDR=n1",
                "TORCHELASTIC_RUN_ID=x",
            ],
            (5, 8, 1, 4, "torchrun"),
        ),
        (
            "torchrun under srun, one agent a node",
            with(
                SRUN_3_OF_4,
                &[
                    "RANK=6",
                    "WORLD_SIZE=8",
                    "LOCAL_RANK=2",
                    "LOCAL_WORLD_SIZE=4",
                    "SLURM_PROCID=1",
                    "SLURM_STEP_NUM_TASKS=2",
                    "SLURM_LOCALID=0",
                    "SLURM_STEP_TASKS_PER_NODE=1(x2)",
                ],
            ),
            (6, 8, 2, 4, "torchrun"),
        ),
        ("a lone RANK of something else", vec!["RANK=3"], (0, 1, 0, 1, "none")),
        ("a lone WORLD_SIZE of something else", vec!["WORLD_SIZE=3"], (0, 1, 0, 1, "none")),
        ("Open MPI 4 mpirun", OPEN_MPI_1_OF_2.to_vec(), (1, 2, 1, 2, "Open MPI")),
        (
            "Open MPI 5 mpirun (PRRTE)",
            with(OPEN_MPI_1_OF_2, &["OMPI_MCA_orte_hnp_uri=", "PRTE_LAUNCHED=1"]),
            (1, 2, 1, 2, "Open MPI"),
        ),
        ("Open MPI in a batch script", with(OPEN_MPI_1_OF_2, BATCH_SCRIPT), (1, 2, 1, 2, "Open MPI")),
        (
            "Open MPI over Slurm's daemons: the step is that of orted, one task a node",
            with(
                SRUN_3_OF_4,
                &[
                    "OMPI_COMM_WORLD_RANK=3",
                    "OMPI_COMM_WORLD_SIZE=4",
                    "OMPI_COMM_WORLD_LOCAL_RANK=1",
                    "OMPI_COMM_WORLD_LOCAL_SIZE=2",
                    "SLURM_PROCID=1",
                    "SLURM_LOCALID=0",
                    "SLURM_STEP_NUM_TASKS=2",
                    "SLURM_STEP_TASKS_PER_NODE=1(x2)",
                ],
            ),
            (3, 4, 1, 2, "Open MPI"),
        ),
        (
            "Open MPI, one rank, in an interactive srun shell",
            vec![
                "OMPI_COMM_WORLD_RANK=0",
                "OMPI_COMM_WORLD_SIZE=1",
                "OMPI_COMM_WORLD_LOCAL_RANK=0",
                "OMPI_COMM_WORLD_LOCAL_SIZE=1",
                "SLURM_STEP_ID=0",
                "SLURM_PROCID=0",
                "SLURM_LOCALID=0",
                "SLURM_STEP_NUM_TASKS=1",
            ],
            (0, 1, 0, 1, "Open MPI"),
        ),
        ("MPICH's Hydra", HYDRA_1_OF_2.to_vec(), (1, 2, 1, 2, pmi)),
        ("Intel MPI", with(HYDRA_1_OF_2, &["I_MPI_HYDRA_TOPOLIB=hwloc"]), (1, 2, 1, 2, pmi)),
        (
            "Hydra in a batch script: Slurm's variables claim rank 0 of 4",
            with(HYDRA_1_OF_2, BATCH_SCRIPT),
            (1, 2, 1, 2, pmi),
        ),
        (
            "Hydra with -pmi-port, size from the other variable",
            vec!["PMI_ID=1", "PMI_SIZE=2", "PMI_PORT=h:1", "MPI_LOCALRANKID=1", "MPI_LOCALNRANKS=2"],
            (1, 2, 1, 2, pmi),
        ),
        (
            "Cray PALS",
            vec!["PMI_RANK=9", "PMI_SIZE=16", "PMI_LOCAL_RANK=1", "PMI_LOCAL_SIZE=8", "PALS_RANKID=9"],
            (9, 16, 1, 8, pmi),
        ),
        ("a PMI world of one without local variables", vec!["PMI_RANK=0", "PMI_SIZE=1"], (0, 1, 0, 1, pmi)),
        (
            "MVAPICH2",
            vec![
                "MV2_COMM_WORLD_RANK=2",
                "MV2_COMM_WORLD_SIZE=4",
                "MV2_COMM_WORLD_LOCAL_RANK=0",
                "MV2_COMM_WORLD_LOCAL_SIZE=2",
            ],
            (2, 4, 0, 2, "MVAPICH2"),
        ),
        (
            "MVAPICH2 over Hydra: both sets, agreeing",
            with(
                HYDRA_1_OF_2,
                &[
                    "MV2_COMM_WORLD_RANK=1",
                    "MV2_COMM_WORLD_SIZE=2",
                    "MV2_COMM_WORLD_LOCAL_RANK=1",
                    "MV2_COMM_WORLD_LOCAL_SIZE=2",
                ],
            ),
            (1, 2, 1, 2, pmi),
        ),
        ("srun", SRUN_3_OF_4.to_vec(), (3, 4, 1, 2, "srun")),
        (
            "srun without --ntasks-per-node: an uneven layout, first node",
            with(SRUN_3_OF_4, &with(&srun_uneven, &["SLURM_PROCID=2", "SLURM_LOCALID=2", "SLURM_NODEID=0"])),
            (2, 4, 2, 3, "srun"),
        ),
        (
            "the same, second node",
            with(SRUN_3_OF_4, &with(&srun_uneven, &["SLURM_LOCALID=0"])),
            (3, 4, 0, 1, "srun"),
        ),
        (
            "srun, run-length form with a tail",
            with(
                SRUN_3_OF_4,
                &[
                    "SLURM_PROCID=6",
                    "SLURM_STEP_NUM_TASKS=7",
                    "SLURM_LOCALID=0",
                    "SLURM_NODEID=3",
                    "SLURM_STEP_TASKS_PER_NODE=2(x3),1",
                ],
            ),
            (6, 7, 0, 1, "srun"),
        ),
        (
            "a step smaller than its job: the step's size counts",
            with(
                SRUN_3_OF_4,
                &[
                    "SLURM_STEP_ID=2",
                    "SLURM_PROCID=1",
                    "SLURM_NTASKS=8",
                    "SLURM_STEP_NUM_TASKS=2",
                    "SLURM_NODEID=0",
                ],
            ),
            (1, 2, 1, 2, "srun"),
        ),
        (
            "srun --mpi=pmi2: PMI gives the rank, Slurm the local part",
            with(SRUN_3_OF_4, &["PMI_RANK=3", "PMI_SIZE=4", "PMI_FD=7"]),
            (3, 4, 1, 2, pmi),
        ),
        (
            "srun --mpi=pmix",
            with(SRUN_3_OF_4, &["PMIX_RANK=3", "PMIX_NAMESPACE=slurm.pmix.7.0"]),
            (3, 4, 1, 2, "srun"),
        ),
        ("a batch script is no rank", BATCH_SCRIPT.to_vec(), (0, 1, 0, 1, "none")),
        (
            "the batch step of a newer Slurm, which exports its step id",
            with(BATCH_SCRIPT, &["SLURM_STEP_ID=4294967291"]),
            (0, 1, 0, 1, "none"),
        ),
        (
            "an interactive step (salloc with use_interactive_step)",
            with(BATCH_SCRIPT, &["SLURM_STEP_ID=4294967290"]),
            (0, 1, 0, 1, "none"),
        ),
        (
            "mentee run, one worker, inside a step of four",
            with(
                SRUN_3_OF_4,
                &["MENTEE_RANK=0", "MENTEE_WORLD_SIZE=1", "MENTEE_LOCAL_RANK=0", "MENTEE_LOCAL_SIZE=1"],
            ),
            (0, 1, 0, 1, "mentee"),
        ),
        ("a rank of another kind", vec!["RANK=captain"], (0, 1, 0, 1, "none")),
        ("a lone size of another kind", vec!["WORLD_SIZE=large", "RANK="], (0, 1, 0, 1, "none")),
        ("a rank of another kind, in a launcher's", with(HYDRA_1_OF_2, &["RANK=captain"]), (1, 2, 1, 2, pmi)),
        ("variables set to nothing", vec!["PMI_RANK=", "PMI_SIZE=", "SLURM_STEP_ID="], (0, 1, 0, 1, "none")),
    ];
    assert!(table.len() >= 25);
    for (name, environment, (rank, world_size, local_rank, local_size, source)) in table {
        let expected = Identity { rank, world_size, local_rank, local_size, source };
        assert_eq!(identity(&environment), Ok(expected), "{name}: {environment:?}");
    }
}

#[test]
fn contradictions_and_halves_are_refused_with_both_sides_named() {
    let table: Vec<(&str, Vec<&'static str>, &str)> = vec![
        (
            "torchrun inside mpirun",
            with(OPEN_MPI_1_OF_2, &["RANK=0", "WORLD_SIZE=4", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=4"]),
            "torchrun says rank 0 of 4 but Open MPI says rank 1 of 2",
        ),
        (
            "one mpirun inside the other",
            with(HYDRA_1_OF_2, &with(OPEN_MPI_1_OF_2, &["OMPI_COMM_WORLD_RANK=0"])),
            "Open MPI says rank 0 of 2 but PMI (MPICH, Intel or Cray MPI) says rank 1 of 2",
        ),
        (
            "own variables against mpirun",
            with(
                HYDRA_1_OF_2,
                &["MENTEE_RANK=0", "MENTEE_WORLD_SIZE=1", "MENTEE_LOCAL_RANK=0", "MENTEE_LOCAL_SIZE=1"],
            ),
            "mentee says rank 0 of 1 but PMI (MPICH, Intel or Cray MPI) says rank 1 of 2",
        ),
        (
            "mpirun -n 1 started by each of four srun tasks",
            with(SRUN_3_OF_4, &["PMI_RANK=0", "PMI_SIZE=1"]),
            "PMI (MPICH, Intel or Cray MPI) says rank 0 of 1 but srun says rank 3 of 4",
        ),
        ("a rank without a size", vec!["PMI_RANK=1"], "set PMI_RANK but not PMI_SIZE"),
        ("-pmi-port without a size", vec!["PMI_ID=1", "PMI_PORT=h:1"], "set PMI_ID but not PMI_SIZE"),
        ("a size without a rank", vec!["OMPI_COMM_WORLD_SIZE=2"], "but not OMPI_COMM_WORLD_RANK"),
        ("no local rank", vec!["PMI_RANK=1", "PMI_SIZE=2"], "set PMI_RANK but not MPI_LOCALRANKID"),
        ("no local size", vec!["RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=1"], "but not LOCAL_WORLD_SIZE"),
        ("a step without a task id", vec!["SLURM_STEP_ID=0"], "set SLURM_STEP_ID but not SLURM_PROCID"),
        ("not a number", with(HYDRA_1_OF_2, &["PMI_SIZE=two"]), "PMI_SIZE = \"two\" is no whole number"),
        (
            "torchrun's, and not a number",
            vec!["RANK=captain", "WORLD_SIZE=2"],
            "RANK = \"captain\" is no whole number",
        ),
        ("negative", with(HYDRA_1_OF_2, &["PMI_RANK=-1"]), "PMI_RANK = \"-1\" is no whole number"),
        ("rank beyond the world", with(HYDRA_1_OF_2, &["PMI_RANK=2"]), "says rank 2 of 2"),
        ("local rank beyond", with(HYDRA_1_OF_2, &["MPI_LOCALRANKID=2"]), "says local rank 2 of 2"),
        ("a world of none", vec!["PMI_RANK=0", "PMI_SIZE=0"], "says rank 0 of 0"),
        (
            "a node beyond the list",
            with(SRUN_3_OF_4, &["SLURM_STEP_TASKS_PER_NODE=4"]),
            "SLURM_STEP_TASKS_PER_NODE = \"4\" cannot be read at node 1",
        ),
        (
            "a list nobody can read",
            with(SRUN_3_OF_4, &["SLURM_STEP_TASKS_PER_NODE=2(y2)"]),
            "SLURM_STEP_TASKS_PER_NODE = \"2(y2)\" cannot be read",
        ),
    ];
    for (name, environment, part) in table {
        let error = identity(&environment).expect_err(name).to_string();
        assert!(error.contains(part), "{name}: {error}");
        assert!(!error.contains('\n'), "{name}: one line");
    }
}

#[test]
fn a_supervisor_can_clear_what_it_inherited() {
    let cleared: Vec<&str> = mentee_cluster::identity::variables().collect();
    let leaked = with(HYDRA_1_OF_2, OPEN_MPI_1_OF_2);
    let rest: Vec<&str> = leaked
        .into_iter()
        .filter(|pair| !cleared.contains(&pair.split_once('=').expect("a pair").0))
        .collect();
    assert_eq!(identity(&rest).map(|found| found.source), Ok("none"));
}

fn environment<'a>(pairs: &'a [&str]) -> impl Fn(&str) -> Option<String> + 'a {
    |name| {
        let pair = pairs.iter().find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name));
        pair.map(|(_, value)| value.to_owned())
    }
}

#[test]
fn compressed_node_lists_unfold() {
    let table: &[(&str, Option<&[&str]>)] = &[
        ("n1", Some(&["n1"])),
        ("n[1-2]", Some(&["n1", "n2"])),
        ("n[1-2,05-07],login", Some(&["n1", "n2", "n05", "n06", "n07", "login"])),
        ("gpu[098-101]", Some(&["gpu098", "gpu099", "gpu100", "gpu101"])),
        ("r[1-2]n[1,3]", Some(&["r1n1", "r1n3", "r2n1", "r2n3"])),
        ("a-[1-2]-ib,b.x.org", Some(&["a-1-ib", "a-2-ib", "b.x.org"])),
        ("", None),
        ("n[1-2", None),
        ("n1-2]", None),
        ("n[2-1]", None),
        ("n[a-b]", None),
        ("n[]", None),
        ("n1,,n2", None),
        ("n[1-99999999]", None),
        ("n[0-9999][0-9999]", None),
    ];
    for (list, expected) in table {
        let expected = expected.map(|names| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        assert_eq!(expand_nodes(list), expected, "{list}");
    }
}

#[test]
fn a_batch_script_is_an_allocation_and_a_step_is_none() {
    let batch = with(BATCH_SCRIPT, &["SLURM_JOB_NODELIST=n[1-2]", "SLURM_RESTART_COUNT=3"]);
    let allocation = Allocation::from_env(&environment(&batch)).expect("an allocation");
    assert_eq!(allocation.job_id, "7");
    assert_eq!(allocation.nodes, ["n1", "n2"]);
    assert_eq!((allocation.restarts, &allocation.array_task), (3, &None));
    let array = with(&batch, &["SLURM_JOB_ID=15", "SLURM_ARRAY_JOB_ID=12", "SLURM_ARRAY_TASK_ID=3"]);
    let task = Allocation::from_env(&environment(&array)).expect("an allocation");
    assert_eq!((task.job_id.as_str(), task.array_task.as_deref()), ("15", Some("12_3")));
    assert_eq!(allocation.node_of("n2"), Some("n2"));
    assert_eq!(allocation.node_of("n2.cluster.org"), Some("n2"));
    assert_eq!(allocation.node_of("n3"), None);
    let step = with(SRUN_3_OF_4, &["SLURM_JOB_NODELIST=n[1-2]"]);
    assert_eq!(Allocation::from_env(&environment(&step)), None);
    assert_eq!(Allocation::from_env(&environment(&["PATH=/bin"])), None);
    let interactive = with(&batch, &["SLURM_STEP_ID=4294967290"]);
    assert!(Allocation::from_env(&environment(&interactive)).is_some());
}

#[test]
fn devices_go_by_local_rank_modulo_what_is_visible() {
    // How Slurm 22.05 handed out two GPUs a node to two ranks a node.
    let table = [
        ("--gpus-per-node=2, first rank", "0,1", 0, Some(0)),
        ("--gpus-per-node=2, second rank", "0,1", 1, Some(1)),
        ("--gpus-per-task=1, first rank", "0", 0, Some(0)),
        ("--gpus-per-task=1, second rank", "1", 1, Some(0)),
        ("--gpu-bind=single:1, second rank", "1", 1, Some(0)),
        ("--gres=gpu:1, second rank: they share it", "0", 1, Some(0)),
        ("eight identifiers, ninth rank", "GPU-a,GPU-b,GPU-c,GPU-d,MIG-e,MIG-f,MIG-g,MIG-h", 8, Some(0)),
        ("none", "", 0, None),
        ("switched off", "-1", 0, None),
        ("the list ends at -1", "2,-1,3", 1, Some(0)),
        ("NoDevFiles, as Slurm says without device files", "NoDevFiles", 0, None),
    ];
    for (name, visible, local_rank, expected) in table {
        let visible = format!("CUDA_VISIBLE_DEVICES={visible}");
        let visible = visible_devices(&environment(&[&visible])).expect("set");
        let identity = Identity { rank: 8, world_size: 16, local_rank, local_size: 9, source: "srun" };
        assert_eq!(identity.device(visible), expected, "{name}");
    }
    assert_eq!(visible_devices(&environment(&[])), None, "all of the machine's");
}

#[test]
fn a_rank_that_is_bound_too_tightly_is_told_the_remedy_of_its_launcher() {
    let advice = |source, allowed, threads| {
        let identity = Identity { rank: 3, world_size: 4, local_rank: 1, local_size: 2, source };
        affinity_advice(&identity, allowed, 64, threads)
    };
    let table = [
        ("Open MPI", "mpirun --bind-to none"),
        ("PMI (MPICH, Intel or Cray MPI)", "mpirun -bind-to none"),
        ("MVAPICH2", "MV2_ENABLE_AFFINITY=0"),
        ("srun", "srun --cpus-per-task=9"),
        ("torchrun", "taskset -p"),
    ];
    for (source, remedy) in table {
        let said = advice(source, 1, 9).unwrap_or_else(|| panic!("{source}: nothing said"));
        assert!(said.starts_with("rank 3 is bound to 1 core of 64 but runs 9 threads"), "{said}");
        assert!(said.contains(remedy) && !said.contains('\n'), "{source}: {said}");
    }
    assert_eq!(advice("srun", 9, 9), None, "enough");
    assert_eq!(advice("srun", 64, 100), None, "not bound at all");
}
