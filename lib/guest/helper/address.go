//go:build linux

package helper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/bottle-tools/bottle/lib/guest"
)

// loopback is the index of lo, the first device of any network namespace.
const loopback = 1

// ownAddresses makes addresses the guest's own, by giving them to its loopback
// device. It takes CAP_NET_ADMIN. Of a block of IPv4 one address is enough: a
// loopback device stands for the whole of it.
func ownAddresses(addresses []guest.Address) error {
	var all []netip.Prefix
	for _, a := range addresses {
		p, err := netip.ParsePrefix(a.CIDR)
		if err != nil {
			return err
		}
		all = append(all, p)
	}
	return addAddresses(all)
}

// ownNames does the same for names, and gives the IPv6 addresses. The one of IPv4
// is there for programs that ask for names of a kind only if the guest has an
// address of it other than 127.0.0.1 (AI_ADDRCONFIG of getaddrinfo(3)).
func ownNames() ([]netip.Addr, error) {
	all := []netip.Prefix{netip.PrefixFrom(lastAddress.Next(), 32)}
	ips := make([]netip.Addr, addresses6)
	for i, ip := 0, firstAddress6; i < len(ips); i, ip = i+1, ip.Next() {
		ips[i] = ip
		all = append(all, netip.PrefixFrom(ip, 128))
	}
	return ips, addAddresses(all)
}

func addAddresses(all []netip.Prefix) error {
	if len(all) == 0 {
		return nil
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer unix.Close(fd)
	for _, p := range all {
		if err := addAddress(fd, p); err != nil {
			return fmt.Errorf("address %s: %w", p, err)
		}
	}
	return nil
}

// addAddress sends one RTM_NEWADDR and waits for the kernel's word, rtnetlink(7).
func addAddress(fd int, p netip.Prefix) error {
	ip, family := p.Addr(), byte(unix.AF_INET6)
	if ip.Is4() {
		family = unix.AF_INET
	}
	if p.Bits() < ip.BitLen()-1 {
		ip = ip.Next() // the first is the network's own name
	}
	raw := ip.AsSlice()
	attr := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofRtAttr+len(raw)))
	attr = append(binary.NativeEndian.AppendUint16(attr, unix.IFA_LOCAL), raw...)
	msg := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+unix.SizeofIfAddrmsg+len(attr)))
	msg = binary.NativeEndian.AppendUint16(msg, unix.RTM_NEWADDR)
	msg = binary.NativeEndian.AppendUint16(msg, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE)
	msg = append(msg, make([]byte, 8)...) // sequence number and port
	msg = append(msg, family, byte(p.Bits()), unix.IFA_F_NODAD, unix.RT_SCOPE_HOST)
	msg = append(binary.NativeEndian.AppendUint32(msg, loopback), attr...)
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(buf[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel's answer makes no sense")
	}
	errno := -int32(binary.NativeEndian.Uint32(buf[unix.SizeofNlMsghdr:]))
	if errno != 0 && unix.Errno(errno) != unix.EEXIST {
		return unix.Errno(errno)
	}
	return nil
}
