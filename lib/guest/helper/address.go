//go:build linux

package helper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

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

// addAddresses sends one RTM_NEWADDR for each in one packet, of which the last asks
// for the kernel's word (rtnetlink(7)); a failure of another is told unasked.
func addAddresses(all []netip.Prefix) error {
	if len(all) == 0 {
		return nil
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer unix.Close(fd)
	var msgs []byte
	for i, p := range all {
		msgs = appendAddress(msgs, p, uint32(i), i == len(all)-1)
	}
	if err := unix.Sendto(fd, msgs, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	buf := make([]byte, 8<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		answers, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		for _, a := range answers {
			i := int(a.Header.Seq)
			if a.Header.Type != unix.NLMSG_ERROR || len(a.Data) < 4 || i >= len(all) {
				return errors.New("netlink: the kernel's answer makes no sense")
			}
			errno := syscall.Errno(-int32(binary.NativeEndian.Uint32(a.Data)))
			if errno != 0 && errno != unix.EEXIST {
				return fmt.Errorf("address %s: %w", all[i], errno)
			}
			if i == len(all)-1 {
				return nil
			}
		}
	}
}

func appendAddress(msgs []byte, p netip.Prefix, seq uint32, ack bool) []byte {
	ip, family := p.Addr(), byte(unix.AF_INET6)
	if ip.Is4() {
		family = unix.AF_INET
	}
	if p.Bits() < ip.BitLen()-1 {
		ip = ip.Next() // the first is the network's own name
	}
	flags := uint16(unix.NLM_F_REQUEST | unix.NLM_F_CREATE)
	if ack {
		flags |= unix.NLM_F_ACK
	}
	raw := ip.AsSlice()
	e := binary.NativeEndian
	msgs = e.AppendUint32(msgs, uint32(unix.SizeofNlMsghdr+unix.SizeofIfAddrmsg+unix.SizeofRtAttr+len(raw)))
	msgs = e.AppendUint16(msgs, unix.RTM_NEWADDR)
	msgs = e.AppendUint16(msgs, flags)
	msgs = e.AppendUint32(msgs, seq)
	msgs = e.AppendUint32(msgs, 0) // the kernel's port
	msgs = append(msgs, family, byte(p.Bits()), unix.IFA_F_NODAD, unix.RT_SCOPE_HOST)
	msgs = e.AppendUint32(msgs, loopback)
	msgs = e.AppendUint16(msgs, uint16(unix.SizeofRtAttr+len(raw)))
	msgs = e.AppendUint16(msgs, unix.IFA_LOCAL)
	return append(msgs, raw...) // of four bytes or sixteen: aligned
}
