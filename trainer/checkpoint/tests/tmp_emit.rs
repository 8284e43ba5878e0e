use mentee_checkpoint::*;
#[test]
fn emit() {
    let run = std::path::PathBuf::from("/tmp/wt-checkpoints-emit");
    let _ = std::fs::remove_dir_all(&run);
    let meta = Meta {
        step: 1000,
        epoch: 3,
        world_size: 2,
        plan_hash: "89abcdef01234567".into(),
        plan_toml: "[run]\nseed = 0\n".into(),
        data_digest: "d1".into(),
        mentee_version: "0.1.0".into(),
    };
    let bias = [0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0];
    let tensors = vec![
        Tensor::new("student.flag", Dtype::U8, &[1], &[7]),
        Tensor::new("student.fc.bias", Dtype::F32, &[2], &bias),
    ];
    write(&run, &meta, &[("state.safetensors".into(), tensors)]).unwrap();
}
