use mentee_config::recipe::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let source = mentee_data::open(a[1].as_ref(), DataFormat::Auto).unwrap();
    let size: u32 = a[2].parse().unwrap();
    let views = Views { preset: ViewPreset::Byol, definition: Definition::Byol, size, resize: Interpolation::Bicubic,
        crop_area: [0.08, 1.0], crop_ratio: [0.75, 4.0/3.0], flip: 0.5, jitter: 0.8, brightness: 0.4, contrast: 0.4, saturation: 0.2, hue: 0.1,
        grayscale: 0.2, blur: if size > 64 { [1.0, 0.1] } else { [0.0, 0.0] }, blur_sigma: [0.1, 2.0], solarize: [0.0, 0.2], mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
    let bench = mentee_data::bench::LoaderBench { source, views, seed: 0, images: a[3].parse().unwrap(), rounds: a[4].parse().unwrap(), threads: vec![] };
    println!("{:#?}", mentee_data::bench::loader(&bench, &mut |_, _| {}).unwrap());
}
