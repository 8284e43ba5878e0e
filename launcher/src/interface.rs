//! From `--interface` to an address: given as one, or as the name of a network interface of this machine.

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::failure::Failure;

/// The address that `name`, given by `option`, means here.
///
/// # Errors
/// [`Failure`] with exit code 2 that lists the interfaces there are.
pub fn address(option: &str, name: &str) -> Result<IpAddr, Failure> {
    if let Ok(address) = name.parse() {
        return Ok(address);
    }
    let all = interfaces()
        .map_err(|error| Failure::failed(format!("cannot list this machine's interfaces: {error}")))?;
    // IPv4 first: a link-local IPv6 address cannot be reached without its scope.
    let of_name = |v4: bool| {
        all.iter()
            .find(|(interface, address)| interface == name && address.is_ipv4() == v4)
            .map(|found| found.1)
    };
    of_name(true).or_else(|| of_name(false)).ok_or_else(|| {
        let mut names: Vec<&str> = all.iter().map(|(interface, _)| interface.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        Failure::usage(format!(
            "{option} {name} is no address and no interface of this machine, which has {}",
            names.join(", ")
        ))
    })
}

/// Every interface of this machine with each of its addresses.
fn interfaces() -> std::io::Result<Vec<(String, IpAddr)>> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: getifaddrs writes one pointer, to a list that is freed below.
    if unsafe { libc::getifaddrs(&mut first) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = first;
    while !next.is_null() {
        // SAFETY: `next` is an entry of the list, which is not freed yet.
        let entry = unsafe { &*next };
        next = entry.ifa_next;
        if entry.ifa_addr.is_null() || entry.ifa_name.is_null() {
            continue;
        }
        // SAFETY: not null, and every kind of address begins with its family.
        let family = i32::from(unsafe { (*entry.ifa_addr).sa_family });
        let address = match family {
            libc::AF_INET => {
                // SAFETY: an address of this family is a sockaddr_in; read without an assumption on alignment.
                let address = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
                IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)))
            }
            libc::AF_INET6 => {
                // SAFETY: an address of this family is a sockaddr_in6; read without an assumption on alignment.
                let address = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
                IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr))
            }
            _ => continue,
        };
        // SAFETY: not null, and a C string by getifaddrs' contract.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned();
        found.push((name, address));
    }
    // SAFETY: `first` is getifaddrs' list, and nothing of it is used from here on.
    unsafe { libc::freeifaddrs(first) };
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_itself_and_a_name_is_looked_up() {
        assert_eq!(
            address("--interface", "10.1.2.3").expect("an address"),
            IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3))
        );
        assert!(address("--interface", "lo").expect("every machine has it").is_loopback());
        let failure = address("--there", "no-such0").expect_err("not there");
        assert_eq!(failure.exit_code, 2);
        assert!(failure.line.starts_with("--there no-such0 is no address"), "{}", failure.line);
        let listed = failure.line.split_once("which has ").expect("a list").1;
        let mut names: Vec<_> = listed.split(", ").collect();
        assert!(names.contains(&"lo"), "{listed}");
        names.dedup();
        assert_eq!(names.join(", "), listed, "each once");
    }
}
