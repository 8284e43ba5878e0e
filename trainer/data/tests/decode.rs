//! Decoding: every colour type becomes RGB by the stated rule; nothing damaged passes.

mod common;

use common::{jpeg, noise, png};
use jpeg_encoder::ColorType as Jpeg;
use mentee_data::Encoding;
use mentee_data::decode;
use mentee_data::decode::{CropBox, DecodeError, Decoder, PlanarImage, RgbImage};
use png::{BitDepth, ColorType};

fn pixels(bytes: &[u8]) -> Vec<u8> {
    decode(bytes).unwrap().data
}

#[test]
fn png_colour_types() {
    let rgb = noise(5 * 4 * 3, 1);
    let whole = decode(&png(5, 4, ColorType::Rgb, BitDepth::Eight, &rgb)).unwrap();
    assert_eq!(whole, RgbImage { width: 5, height: 4, data: rgb });
    assert_eq!(
        pixels(&png(2, 1, ColorType::Grayscale, BitDepth::Eight, &[7, 250])),
        [7, 7, 7, 250, 250, 250]
    );
    // Alpha is dropped, whatever it says.
    assert_eq!(
        pixels(&png(2, 1, ColorType::GrayscaleAlpha, BitDepth::Eight, &[7, 0, 9, 255])),
        [7, 7, 7, 9, 9, 9]
    );
    assert_eq!(
        pixels(&png(2, 1, ColorType::Rgba, BitDepth::Eight, &[1, 2, 3, 0, 4, 5, 6, 255])),
        [1, 2, 3, 4, 5, 6]
    );
    // 16 bits keep their high byte; 1 bit spreads over the range; a palette is looked up.
    assert_eq!(pixels(&png(1, 1, ColorType::Rgb, BitDepth::Sixteen, &[1, 255, 2, 128, 3, 0])), [1, 2, 3]);
    assert_eq!(
        pixels(&png(1, 1, ColorType::Rgba, BitDepth::Sixteen, &[1, 255, 2, 128, 3, 0, 9, 9])),
        [1, 2, 3]
    );
    assert_eq!(
        pixels(&png(2, 1, ColorType::Grayscale, BitDepth::One, &[0b0100_0000])),
        [0, 0, 0, 255, 255, 255]
    );
    assert_eq!(pixels(&png(2, 1, ColorType::Indexed, BitDepth::Eight, &[1, 0])), [200, 100, 50, 10, 20, 30]);
}

#[test]
fn jpeg_colour_types() {
    for progressive in [false, true] {
        let rgb = decode(&jpeg(33, 17, progressive, Jpeg::Rgb)).unwrap();
        assert_eq!((rgb.width, rgb.height, rgb.data.len()), (33, 17, 33 * 17 * 3));
        let luma = decode(&jpeg(33, 17, progressive, Jpeg::Luma)).unwrap();
        for y in 0..17usize {
            for x in 0..33usize {
                let at = (y * 33 + x) * 3;
                for c in 0..3 {
                    let expected = (40 + 3 * x + 2 * y + 20 * c) as i32;
                    assert!((i32::from(rgb.data[at + c]) - expected).abs() <= 6, "{x} {y} {c}");
                }
                assert!((i32::from(luma.data[at]) - (40 + 3 * x + 2 * y) as i32).abs() <= 4, "{x} {y}");
                assert!(luma.data[at] == luma.data[at + 1] && luma.data[at] == luma.data[at + 2]);
            }
        }
    }
    // Adobe's inverted CMYK: (255 − ink) · (255 − black) / 255.
    let cmyk = decode(&jpeg(16, 16, false, Jpeg::Cmyk)).unwrap();
    for c in 0..3 {
        let (ink, black) = (40.0 + 20.0 * f64::from(c), 100.0);
        let expected = (255.0 - ink) * (255.0 - black) / 255.0;
        assert!(
            (f64::from(cmyk.data[c as usize]) - expected).abs() < 8.0,
            "{:?} {c} {expected}",
            &cmyk.data[..3]
        );
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let files = [
        jpeg(40, 30, false, Jpeg::Rgb),
        jpeg(40, 30, true, Jpeg::Rgb),
        jpeg(40, 30, false, Jpeg::Luma),
        common::rgb_png(9, 7, 3),
        png(9, 7, ColorType::Grayscale, BitDepth::Eight, &noise(63, 4)),
    ];
    for file in files {
        assert!(decode(&file).is_ok());
        for length in 0..file.len() {
            let error = decode(&file[..length]).expect_err("cut short");
            let message = error.to_string();
            assert!(!message.contains('\n'), "{message}");
            if length > 600 {
                assert!(matches!(error, DecodeError::Truncated(_)), "{length} of {}: {message}", file.len());
            }
        }
    }
}

#[test]
fn a_thumbnails_end_marker_does_not_hide_a_cut() {
    let photo = jpeg(40, 30, false, Jpeg::Rgb);
    // An APP1 segment that holds an end marker, as an EXIF thumbnail does.
    let mut with_thumbnail = photo[..2].to_vec();
    with_thumbnail.extend([0xFF, 0xE1, 0x00, 0x06, 1, 2, 0xFF, 0xD9]);
    with_thumbnail.extend(&photo[2..]);
    assert!(decode(&with_thumbnail).is_ok());
    let cut = &with_thumbnail[..with_thumbnail.len() - 2];
    assert_eq!(decode(cut), Err(DecodeError::Truncated("JPEG")));
}

/// An image turned as EXIF's `orientation` says, by mirroring and transposing alone.
fn turned(image: &RgbImage, orientation: u16) -> RgbImage {
    let pixels: Vec<&[u8]> = image.data.chunks_exact(3).collect();
    let mut rows: Vec<Vec<&[u8]>> = pixels.chunks_exact(image.width as usize).map(<[_]>::to_vec).collect();
    if orientation >= 5 {
        rows = (0..rows[0].len()).map(|x| rows.iter().map(|row| row[x]).collect()).collect();
    }
    if matches!(orientation, 2 | 3 | 6 | 7) {
        rows.iter_mut().for_each(|row| row.reverse());
    }
    if matches!(orientation, 3 | 4 | 7 | 8) {
        rows.reverse();
    }
    let (width, height) = (rows[0].len() as u32, rows.len() as u32);
    RgbImage { width, height, data: rows.concat().concat() }
}

fn exif(orientation: u16, big: bool) -> Vec<u8> {
    let short = |n: u16| if big { n.to_be_bytes() } else { n.to_le_bytes() };
    let long = |n: u32| if big { n.to_be_bytes() } else { n.to_le_bytes() };
    let mut tiff = if big { b"MM\0\x2a".to_vec() } else { b"II\x2a\0".to_vec() };
    tiff.extend(long(8));
    tiff.extend([short(1), short(0x0112), short(3)].concat());
    tiff.extend(long(1));
    tiff.extend([short(orientation), short(0)].concat());
    tiff.extend(long(0));
    tiff
}

#[test]
fn png_and_webp_stand_upright_too() {
    let stored = RgbImage { width: 5, height: 3, data: noise(45, 8) };
    let png_with = |chunk: Vec<u8>| {
        let mut info = png::Info::with_size(5, 3);
        (info.color_type, info.bit_depth) = (ColorType::Rgb, BitDepth::Eight);
        info.exif_metadata = Some(chunk.into());
        let mut bytes = Vec::new();
        let mut writer = png::Encoder::with_info(&mut bytes, info).unwrap().write_header().unwrap();
        writer.write_image_data(&stored.data).unwrap();
        writer.finish().unwrap();
        bytes
    };
    let webp_with = |chunk: Vec<u8>| {
        let mut bytes = Vec::new();
        let mut encoder = image_webp::WebPEncoder::new(&mut bytes);
        encoder.set_exif_metadata(chunk);
        encoder.encode(&stored.data, 5, 3, image_webp::ColorType::Rgb8).unwrap();
        bytes
    };
    for orientation in 1..=8 {
        let upright = turned(&stored, orientation);
        for chunk in [
            exif(orientation, false),
            exif(orientation, true),
            [&b"Exif\0\0"[..], &exif(orientation, false)].concat(),
        ] {
            let mut behind = png_with(chunk.clone());
            // The chunk behind the pixels, before the end.
            let at = behind.windows(4).position(|name| name == b"eXIf").unwrap() - 4;
            let moved: Vec<u8> = behind.drain(at..at + 12 + chunk.len()).collect();
            let end = behind.len() - 12;
            behind.splice(end..end, moved);
            for file in [png_with(chunk.clone()), behind, webp_with(chunk.clone())] {
                assert_eq!(decode(&file).as_ref(), Ok(&upright), "{orientation}");
                let (mut decoder, mut part) = (Decoder::default(), PlanarImage::default());
                let opened = decoder.open(Encoding::File, &file).unwrap();
                assert_eq!((opened.width, opened.height), (upright.width, upright.height));
                let area = CropBox { x: 1, y: 0, width: 2, height: 3 };
                opened.part(area, &mut part).unwrap();
                let (mut got, mut expected) = (RgbImage::default(), PlanarImage::default());
                part.to_rgb(&mut got);
                expected.take(&upright, area);
                let mut cut = RgbImage::default();
                expected.to_rgb(&mut cut);
                assert_eq!(got, cut, "{orientation}");
            }
        }
    }
    // What says nothing that is understood turns nothing, and neither does a chunk that the header does not announce.
    for chunk in [exif(9, false), exif(0, true), b"Exif\0\0".to_vec(), exif(6, true)[..13].to_vec()] {
        assert_eq!(decode(&png_with(chunk.clone())).as_ref(), Ok(&stored), "{chunk:?}");
        assert_eq!(decode(&webp_with(chunk.clone())).as_ref(), Ok(&stored), "{chunk:?}");
    }
    let mut unannounced = webp_with(exif(6, true));
    assert_eq!(&unannounced[12..16], b"VP8X");
    unannounced[20] &= !8;
    assert_eq!(decode(&unannounced).as_ref(), Ok(&stored));
}

#[test]
fn bytes_behind_the_end_are_nobodys_business() {
    let scan = [0xFF, 0xDA, 0x00, 0x08, 1, 1, 0, 0, 63, 0];
    let trailers: [&[u8]; 4] = [b"trailer", &scan, &scan[..2], &[0xFF, 0xD8, 0xFF, 0xC0, 0xFF, 0xDA, 0x12]];
    for progressive in [false, true] {
        let photo = jpeg(40, 30, progressive, Jpeg::Rgb);
        let scans: Vec<usize> =
            (0..photo.len() - 1).filter(|&at| photo[at] == 0xFF && photo[at + 1] == 0xDA).collect();
        assert_eq!(scans.len() > 2, progressive);
        for trailer in trailers {
            let with = [&photo[..], trailer].concat();
            assert_eq!(decode(&with).map(|image| image.data), Ok(pixels(&photo)), "{trailer:?}");
            // A cut in any scan is one all the same, and so is one just behind it.
            for (i, &scan) in scans.iter().enumerate() {
                let end = scans.get(i + 1).copied().unwrap_or(photo.len() - 2);
                for cut in [scan + 12, (scan + end) / 2, end] {
                    assert_eq!(decode(&photo[..cut]), Err(DecodeError::Truncated("JPEG")), "scan {i}");
                }
            }
        }
        // Another image behind the first, as in stereo photographs, and that one cut.
        let pair = [&photo[..], &photo[..photo.len() - 9]].concat();
        assert_eq!(decode(&pair).map(|image| image.data), Ok(pixels(&photo)));
    }
}

#[test]
fn a_changed_png_byte_is_an_error() {
    let file = common::rgb_png(9, 7, 5);
    for at in 8..file.len() {
        let mut changed = file.clone();
        changed[at] ^= 0x10;
        assert!(decode(&changed).is_err(), "byte {at}");
    }
}

#[test]
fn what_is_no_image_is_named() {
    assert_eq!(decode(b""), Err(DecodeError::Empty));
    assert_eq!(decode(b"GIF89a"), Err(DecodeError::UnknownFormat("47 49 46 38".to_owned())));
    assert_eq!(decode(&[0xFF]), Err(DecodeError::UnknownFormat("ff".to_owned())));
    assert_eq!(decode(&[0xFF, 0xD8, 0xFF]), Err(DecodeError::Truncated("JPEG")));
}

#[test]
fn ppm_headers() {
    let image = RgbImage { width: 2, height: 1, data: vec![35, 10, 3, 4, 5, 6] };
    for header in [
        "P6\n2 1\n255\n",
        "P6 2 1 255 ",
        "P6\t2\r\n1\n\n255\r",
        "P6\n# made by hand\n2 1\n255\n",
        "P6# a\n#b\r2#c 7\n 1# 9\n255# the last\n",
    ] {
        let file = [header.as_bytes(), &image.data].concat();
        assert_eq!(decode(&file).as_ref(), Ok(&image), "{header:?}");
        for length in 3..file.len() {
            assert_eq!(decode(&file[..length]), Err(DecodeError::Truncated("PPM")), "{header:?} {length}");
        }
    }
    for (file, reason) in [
        ("P6 2 1 65535 ...........", "truncated PPM: the file ends before the image does"),
        ("P5 2 1 70000 abcd", "damaged PGM: values up to 70000"),
        ("P5 2 1 0 ab", "damaged PGM: values up to 0"),
        ("P2 2 1 255 1 2", "PNM with text or single bits (P2) is not read: write it as P5 or P6"),
        ("P6 2 x 255 ......", "damaged PPM: no header of width, height and largest value"),
        ("P6 99999999999 1 255 .", "damaged PPM: no header of width, height and largest value"),
        ("P6 0 1 255 .", "0 x 1 pixels: an image without any"),
    ] {
        assert_eq!(decode(file.as_bytes()).unwrap_err().to_string(), reason, "{file}");
    }
}

#[test]
fn white_is_what_a_pgm_says() {
    assert_eq!(
        pixels(b"P5 4 1 100 \x00\x32\x64\xC8"),
        [0, 0, 0, 128, 128, 128, 255, 255, 255, 255, 255, 255]
    );
    assert_eq!(pixels(b"P5 2 1 4095 \x0F\xFF\x08\x00"), [255, 255, 255, 128, 128, 128]);
}

#[test]
fn a_bomb_is_refused_before_memory_is_taken() {
    // A PNG header that promises 60000 x 60000, with a valid checksum.
    let mut bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    bomb.extend(60_000u32.to_be_bytes());
    bomb.extend(60_000u32.to_be_bytes());
    bomb.extend([8, 2, 0, 0, 0]);
    let crc = crc32(&bomb[12..]);
    bomb.extend(crc.to_be_bytes());
    assert_eq!(decode(&bomb), Err(DecodeError::Size { width: 60_000, height: 60_000 }));
    assert_eq!(
        decode(&bomb).unwrap_err().to_string(),
        "60000 x 60000 pixels, more than 100 megapixels: cut it into tiles, or shrink it"
    );
    // A JPEG whose frame header promises 65,000 x 65,000.
    let mut file = jpeg(40, 30, false, Jpeg::Rgb);
    let frame = file.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    file[frame + 5..frame + 9].copy_from_slice(&[0xFD, 0xE8, 0xFD, 0xE8]);
    assert_eq!(decode(&file), Err(DecodeError::Size { width: 65_000, height: 65_000 }));
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 },
        )
    })
}

/// A little-endian TIFF of one strip; tags are (number, type, values).
fn tiff(tags: &[(u16, u16, &[u32])], strip: &[u8]) -> Vec<u8> {
    let mut file = [b"II\x2a\0", &(8 + strip.len() as u32).to_le_bytes()[..], strip].concat();
    let (at, count) = ([8], [strip.len() as u32]);
    let mut tags = tags.to_vec();
    if !tags.iter().any(|&(tag, ..)| tag == 273) {
        tags.extend([(273, 4, &at[..]), (279, 4, &count[..])]);
    }
    let mut beyond = file.len() + 2 + 12 * tags.len() + 4;
    let mut more = Vec::new();
    file.extend((tags.len() as u16).to_le_bytes());
    for (tag, kind, values) in tags {
        file.extend([tag.to_le_bytes(), kind.to_le_bytes()].concat());
        file.extend((values.len() as u32).to_le_bytes());
        let mut bytes: Vec<u8> = match kind {
            3 => values.iter().flat_map(|&v| (v as u16).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        if bytes.len() > 4 {
            file.extend((beyond as u32).to_le_bytes());
            beyond += bytes.len();
            more.extend(bytes);
        } else {
            bytes.resize(4, 0);
            file.extend(bytes);
        }
    }
    file.extend([0; 4]);
    file.extend(more);
    file
}

#[test]
fn a_tiff_that_is_not_read_says_why() {
    type Tags<'a> = &'a [(u16, u16, &'a [u32])];
    let with = |more: Tags<'_>| {
        let mut tags: Vec<(u16, u16, &[u32])> =
            vec![(256, 3, &[2]), (257, 3, &[1]), (258, 3, &[8]), (262, 3, &[1])];
        tags.retain(|(tag, ..)| !more.iter().any(|(other, ..)| other == tag));
        tags.extend(more.iter().filter(|(_, _, values)| !values.is_empty()));
        tiff(&tags, &[7, 9, 0, 0, 0, 0])
    };
    assert_eq!(pixels(&with(&[])), [7, 7, 7, 9, 9, 9]);
    // Without a length of the strip, and with one that is beyond the file, as some programs write what is not packed.
    assert_eq!(pixels(&with(&[(273, 4, &[8])])), [7, 7, 7, 9, 9, 9]);
    assert_eq!(pixels(&with(&[(273, 4, &[8]), (279, 4, &[9999])])), [7, 7, 7, 9, 9, 9]);
    let cases: [(Tags<'_>, &str); 35] = [
        (&[(277, 4, &[70_000])], "damaged TIFF: more than 65535 samples a pixel (tag 277)"),
        (
            &[(258, 3, &[32]), (339, 3, &[3])],
            "TIFF with floating-point numbers of 32 bits is not read: tell `mentee shard` the values that count (--range LOW:HIGH)",
        ),
        (
            &[(339, 3, &[2])],
            "TIFF with signed numbers of 8 bits is not read: tell `mentee shard` the values that count (--range LOW:HIGH)",
        ),
        (
            &[(258, 3, &[32])],
            "TIFF with whole numbers of 32 bits is not read: tell `mentee shard` the values that count (--range LOW:HIGH)",
        ),
        (
            &[(258, 3, &[16]), (339, 3, &[3])],
            "TIFF with floating-point numbers of 16 bits is not read: write 32 bits",
        ),
        (&[(258, 3, &[12])], "TIFF with whole numbers of 12 bits is not read: write 8, 16 or 32 bits"),
        (
            &[(258, 3, &[64]), (339, 3, &[6])],
            "TIFF with complex numbers is not read: write what counts of them",
        ),
        (
            &[(258, 3, &[8, 16, 8]), (262, 3, &[2]), (277, 3, &[3])],
            "TIFF with channels of unlike kinds or depths is not read: write all of them with 8 bits",
        ),
        (
            &[(277, 3, &[2]), (258, 3, &[8; 2])],
            "TIFF with 2 bands and no colours is not read: tell `mentee shard` which are red, green and blue (--bands R,G,B)",
        ),
        (
            &[(256, 4, &[40_000_000])],
            "TIFF with strips of 40000000 x 1 pixels, 1 sample each, is not read: cut it into smaller images",
        ),
        (
            &[(322, 4, &[1 << 25]), (323, 4, &[1]), (324, 4, &[8])],
            "TIFF with tiles of 33554432 x 1 pixels, 1 sample each, is not read: cut it into smaller images",
        ),
        (
            &[(277, 3, &[13]), (258, 3, &[8; 13])],
            "TIFF with 13 bands and no colours is not read: tell `mentee shard` which are red, green and blue (--bands R,G,B)",
        ),
        (&[(259, 3, &[50_000])], "TIFF with Zstandard is not read: write it with LZW or Deflate"),
        (&[(259, 3, &[4])], "TIFF with fax compression is not read: write it with LZW or Deflate"),
        (&[(259, 3, &[6])], "TIFF with JPEG of before 1995 is not read: write it with LZW or Deflate"),
        (&[(259, 3, &[999])], "TIFF with compression 999 is not read: write it with LZW or Deflate"),
        (&[(262, 3, &[8])], "TIFF with colours of CIE L*a*b* is not read: write it as RGB"),
        (&[(262, 3, &[6])], "TIFF with YCbCr colours outside JPEG is not read: write it as RGB"),
        (&[(266, 3, &[2])], "TIFF with bits from the right (FillOrder 2) is not read: write it anew"),
        (
            &[(259, 3, &[5]), (317, 3, &[3])],
            "TIFF with differences (kind 3) of 8 bits is not read: write it without a predictor",
        ),
        (
            &[(258, 3, &[4]), (259, 3, &[5]), (317, 3, &[2])],
            "TIFF with differences (kind 2) of 4 bits is not read: write it without a predictor",
        ),
        (
            &[(259, 3, &[7]), (262, 3, &[5]), (277, 3, &[4])],
            "TIFF with JPEG of other than grey or three colours of 8 bits together is not read: write it anew",
        ),
        (&[(256, 3, &[])], "damaged TIFF: no width (tag 256)"),
        (&[(262, 3, &[])], "damaged TIFF: no colour space (tag 262)"),
        (&[(256, 2, &[2])], "damaged TIFF: tag 256 is of type 2"),
        (&[(256, 3, &[0])], "0 x 1 pixels: an image without any"),
        (
            &[(256, 4, &[20_000]), (257, 4, &[20_000])],
            "20000 x 20000 pixels, more than 100 megapixels: cut it into tiles, or shrink it",
        ),
        (&[(262, 3, &[2])], "damaged TIFF: 1 sample, fewer than its colours have"),
        (&[(262, 3, &[3])], "damaged TIFF: a palette image without palette (tag 320)"),
        (&[(278, 3, &[0])], "damaged TIFF: strips of 2 x 0 pixels"),
        (
            &[(322, 4, &[1 << 31]), (323, 4, &[1 << 31]), (324, 4, &[8])],
            "TIFF with tiles of 2147483648 x 2147483648 pixels, 1 sample each, is not read: cut it into smaller images",
        ),
        (
            &[(257, 3, &[3]), (278, 3, &[1])],
            "damaged TIFF: the image has 3 strips, of which not all are listed",
        ),
        (&[(257, 3, &[400])], "truncated TIFF: the file ends before the image does"),
        (&[(257, 3, &[40]), (259, 3, &[5])], "truncated TIFF: the file ends before the image does"),
        (&[(259, 3, &[8])], "damaged TIFF: corrupt deflate stream"),
    ];
    for (tags, message) in cases {
        assert_eq!(decode(&with(tags)).unwrap_err().to_string(), message, "{tags:?}");
    }
    assert_eq!(
        decode(b"BM, said the text.").unwrap_err(),
        DecodeError::UnknownFormat("42 4d 2c 20".to_owned())
    );
}

/// Of the files in `fixtures/files`, no part has other pixels than the whole.
#[test]
fn other_files_cut_anywhere_are_errors() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/files");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let file = std::fs::read(&path).unwrap();
        let whole = decode(&file).unwrap();
        for length in (0..file.len()).step_by(3) {
            match decode(&file[..length]) {
                // What stands behind the first image may be missing.
                Ok(part) => assert!(part == whole, "{}: {length} of {}", path.display(), file.len()),
                Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
            }
        }
    }
}

/// What holds for a component is the table at its first scan.
#[test]
fn a_quantisation_table_that_comes_later_changes_nothing() {
    let photo = jpeg(40, 30, true, Jpeg::Rgb);
    let scans = photo.windows(2).filter(|pair| *pair == [0xFF, 0xDA]).count();
    assert!(scans > 3, "{scans} scans");
    let last = photo.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).unwrap();
    let tables = [[0xFF, 0xDB, 0, 67, 0].as_slice(), &[77; 64], &[0xFF, 0xDB, 0, 67, 1], &[99; 64]].concat();
    let mut later = photo.clone();
    later.splice(last..last, tables);
    assert_eq!(pixels(&later), pixels(&photo));
}
