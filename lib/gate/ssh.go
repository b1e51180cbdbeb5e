package gate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
)

// Limits of an SSH connection's beginning, RFC 4253 sections 4.2 and 6.1.
const (
	maxVersionLine = 255      // with its end
	maxGreeting    = 8 << 10  // lines of a server before its version line
	maxSSHPacket   = 35 << 10 // a first packet is far from it
)

// openSSH lets a tunnel begin only as SSH does: each side with its version line,
// and then with a packet that may come first. What the client sends after its
// version line has to wait for the host's: otherwise a line that looks right
// would be enough to send anything to a service that is none of SSH.
func openSSH() opening {
	isSSH := make(chan bool, 1)
	return opening{
		out: func(dst, src net.Conn) (int64, error) {
			s := &sshStart{src: src, dst: dst, who: "the client"}
			if err := s.version(0); err != nil {
				return s.passed, err
			}
			if !<-isSSH {
				return s.passed, io.EOF
			}
			return s.passed, s.firstPacket()
		},
		in: func(dst, src net.Conn) (int64, error) {
			defer close(isSSH)
			s := &sshStart{src: src, dst: dst, who: "the host"}
			if err := s.version(maxGreeting); err != nil {
				return s.passed, err
			}
			isSSH <- true
			return s.passed, s.firstPacket()
		},
	}
}

// sshStart passes the beginning of one direction on, as far as it has been looked
// at.
type sshStart struct {
	src    io.Reader
	dst    io.Writer
	who    string
	got    []byte // read and not passed on
	passed int64
}

func (s *sshStart) pass(n int) error {
	_, err := s.dst.Write(s.got[:n])
	s.got = s.got[n:]
	s.passed += int64(n)
	return err
}

// fill reads until at least n bytes are there.
func (s *sshStart) fill(n int) error {
	var buf [1 << 10]byte
	for len(s.got) < n {
		m, err := s.src.Read(buf[:])
		s.got = append(s.got, buf[:m]...)
		if err != nil && len(s.got) < n {
			return endOfStream(err)
		}
	}
	return nil
}

// version passes the version line on, and up to before bytes of whole lines in
// front of it.
func (s *sshStart) version(before int) error {
	for line := 0; ; {
		end := bytes.IndexByte(s.got[line:], '\n')
		if start := s.got[line:]; bytes.HasPrefix(start, []byte("SSH-")) {
			switch {
			case end >= 0 && end < maxVersionLine && isVersionLine(start[:end]):
				return s.pass(line + end + 1)
			case end >= 0 || len(start) >= maxVersionLine:
				return s.notSSH("a version line that is none of SSH 2")
			}
		} else if end >= 0 && line+end < before {
			line += end + 1
			continue
		} else if len(s.got) > before && !bytes.HasPrefix([]byte("SSH-"), start) {
			return s.notSSH("something else than an SSH version line")
		}
		if err := s.fill(len(s.got) + 1); err != nil {
			return err
		}
	}
}

// isVersionLine: SSH-protoversion-softwareversion SP comments. Version 1.99 is a
// server of version 2 that would also take version 1.
func isVersionLine(line []byte) bool {
	line = bytes.TrimSuffix(line, []byte("\r"))
	for _, c := range line {
		if c < 0x20 || c == 0x7f {
			return false
		}
	}
	for _, v := range []string{"SSH-2.0-", "SSH-1.99-"} {
		if rest, ok := bytes.CutPrefix(line, []byte(v)); ok {
			return len(rest) > 0 && rest[0] != ' '
		}
	}
	return false
}

// firstPacket looks at the packet behind the version line, which is not
// encrypted: KEXINIT, or one of those that may come at any time (RFC 4253
// sections 7.1 and 11).
func (s *sshStart) firstPacket() error {
	// Its length, that of its padding, and the kind of message.
	if err := s.fill(6); err != nil {
		// What the other direction has cut off while it came is no fault of this
		// side.
		if len(s.got) > 0 && !errors.Is(err, net.ErrClosed) {
			return s.notSSH("no SSH packet after its version line")
		}
		return err
	}
	const disconnect, debug, kexinit = 1, 4, 20
	length, padding, kind := binary.BigEndian.Uint32(s.got), s.got[4], s.got[5]
	if length > maxSSHPacket || padding < 4 || uint32(padding)+2 > length || kind != kexinit && (kind < disconnect || kind > debug) {
		return s.notSSH("no SSH packet after its version line")
	}
	return s.pass(len(s.got))
}

func (s *sshStart) notSSH(what string) error {
	return refused("not_ssh", "", 0, s.who+" began with "+what, `if this is another protocol, say so in the manifest: "protocol": "tcp"`)
}
