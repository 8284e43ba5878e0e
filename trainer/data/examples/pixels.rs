//! Prints the checksum (CRC-32) of every file's RGB pixels, or why it has none.
fn main() {
    for path in std::env::args().skip(1) {
        let bytes = std::fs::read(&path).expect("readable");
        match mentee_data::decode(&bytes) {
            Ok(image) => {
                let mut crc = flate2::Crc::new();
                crc.update(&image.data);
                println!("{path} {} {} {:08x}", image.width, image.height, crc.sum());
            }
            Err(error) => println!("{path} {error}"),
        }
    }
}
