//go:build linux

package helper

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

func testResolver(asked *[]string) *resolver {
	return newResolver(func(name string, v6 bool) (netip.Addr, error) {
		if asked != nil {
			*asked = append(*asked, name)
		}
		switch name {
		case "both.test":
			if v6 {
				return netip.MustParseAddr("fd00::9"), nil
			}
			return netip.MustParseAddr("127.64.0.8"), nil
		case "a.test":
			if v6 {
				return netip.Addr{}, nil
			}
			return netip.MustParseAddr("127.64.0.9"), nil
		case "broken.test":
			return netip.Addr{}, errors.New("no gate")
		}
		return netip.Addr{}, errRefused
	})
}

func query(t *testing.T, name string, kind dnsmessage.Type, class dnsmessage.Class) []byte {
	t.Helper()
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: 77, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: class}}}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestResolverAnswers(t *testing.T) {
	var asked []string
	r := testResolver(&asked)
	const in = dnsmessage.ClassINET
	for _, c := range []struct {
		name    string
		kind    dnsmessage.Type
		class   dnsmessage.Class
		code    dnsmessage.RCode
		address string
	}{
		{"a.test.", dnsmessage.TypeA, in, dnsmessage.RCodeSuccess, "127.64.0.9"},
		{"A.tESt.", dnsmessage.TypeA, in, dnsmessage.RCodeSuccess, "127.64.0.9"},
		{"a.test.", dnsmessage.TypeAAAA, in, dnsmessage.RCodeSuccess, ""},
		{"both.test.", dnsmessage.TypeAAAA, in, dnsmessage.RCodeSuccess, "fd00::9"},
		{"both.test.", dnsmessage.TypeA, in, dnsmessage.RCodeSuccess, "127.64.0.8"},
		{"both.test.", dnsmessage.TypeALL, in, dnsmessage.RCodeSuccess, ""},
		{"a.test.", dnsmessage.TypeTXT, in, dnsmessage.RCodeSuccess, ""},
		{"a.test.", 65, in, dnsmessage.RCodeSuccess, ""},
		{"a.test.", dnsmessage.TypeA, dnsmessage.ClassCHAOS, dnsmessage.RCodeNameError, ""},
		{"other.test.", dnsmessage.TypeA, in, dnsmessage.RCodeNameError, ""},
		{"other.test.", dnsmessage.TypeTXT, in, dnsmessage.RCodeNameError, ""},
		{"broken.test.", dnsmessage.TypeA, in, dnsmessage.RCodeServerFailure, ""},
		{"localhost.", dnsmessage.TypeA, in, dnsmessage.RCodeSuccess, "127.0.0.1"},
		{"x.localhost.", dnsmessage.TypeAAAA, in, dnsmessage.RCodeSuccess, "::1"},
		{"9.0.64.127.in-addr.arpa.", dnsmessage.TypePTR, in, dnsmessage.RCodeNameError, ""},
		{"sp ace.test.", dnsmessage.TypeA, in, dnsmessage.RCodeNameError, ""},
		{"a\r\nb.test.", dnsmessage.TypeA, in, dnsmessage.RCodeNameError, ""},
		{".", dnsmessage.TypeNS, in, dnsmessage.RCodeNameError, ""},
	} {
		var m dnsmessage.Message
		if err := m.Unpack(r.answer(query(t, c.name, c.kind, c.class))); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		got := ""
		for _, a := range m.Answers {
			switch b := a.Body.(type) {
			case *dnsmessage.AResource:
				got += netip.AddrFrom4(b.A).String()
			case *dnsmessage.AAAAResource:
				got += netip.AddrFrom16(b.AAAA).String()
			}
		}
		if m.RCode != c.code || got != c.address || m.ID != 77 || !m.Response || len(m.Authorities) != 0 ||
			len(m.Questions) != 1 || m.Questions[0].Name.String() != c.name {
			t.Errorf("%s %v: %+v", c.name, c.kind, m)
		}
	}
	for _, name := range asked {
		if strings.ContainsAny(name, " \r\n") || strings.HasSuffix(name, ".arpa") {
			t.Errorf("the gate was asked for %q", name)
		}
	}
}

func TestResolverRefusesOtherMessages(t *testing.T) {
	r := testResolver(nil)
	good := query(t, "a.test.", dnsmessage.TypeA, dnsmessage.ClassINET)
	response := append([]byte(nil), good...)
	response[2] |= 0x80
	for what, q := range map[string][]byte{"nothing": {}, "half a header": good[:7], "an answer": response} {
		if a := r.answer(q); a != nil {
			t.Errorf("%s: %x", what, a)
		}
	}
	notify := append([]byte(nil), good...)
	notify[2] |= 4 << 3
	two := append([]byte(nil), good...)
	two[5] = 2
	two = append(two, good[12:]...)
	for what, c := range map[string]struct {
		query []byte
		code  dnsmessage.RCode
	}{
		"another operation": {notify, dnsmessage.RCodeNotImplemented}, "two questions": {two, dnsmessage.RCodeFormatError},
		"a cut question": {good[:15], dnsmessage.RCodeFormatError},
	} {
		var m dnsmessage.Message
		if err := m.Unpack(r.answer(c.query)); err != nil || m.RCode != c.code || len(m.Answers) != 0 {
			t.Errorf("%s: %+v, %v", what, m, err)
		}
	}
}

// Go's own resolver asks over both.
func TestResolverOverUDPAndTCP(t *testing.T) {
	r := testResolver(nil)
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	streams, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer streams.Close()
	go r.servePackets(packets)
	go r.serveStreams(streams)
	for network, address := range map[string]string{"udp": packets.LocalAddr().String(), "tcp": streams.Addr().String()} {
		client := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, address)
		}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if ips, err := client.LookupHost(ctx, "a.test."); err != nil || len(ips) != 1 || ips[0] != "127.64.0.9" {
			t.Errorf("%s: %v, %v", network, ips, err)
		}
		_, err := client.LookupHost(ctx, "other.test.")
		var dns *net.DNSError
		if !errors.As(err, &dns) || !dns.IsNotFound {
			t.Errorf("%s: %v", network, err)
		}
	}
}

func FuzzResolver(f *testing.F) {
	m := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("a.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	b, err := m.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, q []byte) {
		r := newResolver(func(name string, _ bool) (netip.Addr, error) {
			if !askable(name) {
				t.Errorf("asked for %q", name)
			}
			return netip.MustParseAddr("127.64.0.1"), nil
		})
		a := r.answer(q)
		if a == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(a); err != nil || !m.Response || len(a) > 512 {
			t.Errorf("%x: %x, %v", q, a, err)
		}
	})
}
